#include "launcher/line_reader.h"

#include <histedit.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <clocale>
#include <csignal>
#include <cstdio>
#include <cwchar>
#include <iostream>
#include <string_view>

#include "launcher/interrupt.h"

namespace shoal {
namespace {

constexpr int kHistoryLines = 500;
// A message of more than chat.cc takes need not be gathered any further.
constexpr size_t kMaxMessageBytes = 2u << 20;

// What mbrtowc says.
constexpr auto kNoLetter = static_cast<size_t>(-1), kHalfALetter = static_cast<size_t>(-2);

const char* FirstPrompt(EditLine*) { return "> "; }
const char* NextPrompt(EditLine*) { return "  "; }

// libedit reads bytes through mbrtowc: without a UTF-8 locale it drops every letter beyond ASCII.
void UseUtf8() {
  if (std::setlocale(LC_CTYPE, "") != nullptr && MB_CUR_MAX > 1) return;
  std::setlocale(LC_CTYPE, "C.UTF-8");
}

// Whether the next line has been sent already: nobody types that fast, so it belongs to a paste.
bool InputWaits() {
  constexpr int kPasteMs = 30;  // a terminal emulator writes a paste in pieces
  pollfd in{STDIN_FILENO, POLLIN, 0};
  return poll(&in, 1, kPasteMs) > 0 && (in.revents & POLLIN) != 0;
}

// libedit handles the first of these in a line, and later ones only in the next: they must end the
// wait for input all the same.
void WakeOnTerminalChanges() {
  struct sigaction action {};
  action.sa_handler = [](int) {};
  for (const int signal : {SIGWINCH, SIGCONT}) sigaction(signal, &action, nullptr);
}

// 1 when a byte waits, 0 when the terminal changed, -1 on Ctrl-C.
int WaitForByte(const Interrupt& interrupt) {
  pollfd polls[] = {{STDIN_FILENO, POLLIN, 0}, {interrupt.fd(), POLLIN, 0}};
  const int n = poll(polls, 2, -1);
  if (polls[1].revents != 0) return -1;
  return n > 0 ? 1 : 0;
}

}  // namespace

int LineReader::ReadCharacter(EditLine* editor, wchar_t* out) {
  LineReader* reader = nullptr;
  el_get(editor, EL_CLIENTDATA, &reader);
  std::mbstate_t state{};
  while (true) {
    const int ready = WaitForByte(reader->interrupt_);
    if (ready < 0) return -1;
    if (ready == 0) {
      el_resize(editor);
      el_set(editor, EL_REFRESH);
      continue;
    }
    char byte = 0;
    const ssize_t got = read(STDIN_FILENO, &byte, 1);
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (got <= 0) return 0;
    size_t used = std::mbrtowc(out, &byte, 1, &state);
    if (used == kNoLetter) {  // what came before is left out; the byte may begin another
      state = {};
      used = std::mbrtowc(out, &byte, 1, &state);
    }
    if (used == kNoLetter) state = {};
    if (used != kNoLetter && used != kHalfALetter) return 1;
  }
}

LineReader::LineReader(Interrupt& interrupt) : interrupt_(interrupt) {
  if (isatty(STDIN_FILENO) == 0) return;
  UseUtf8();
  WakeOnTerminalChanges();
  editor_ = el_init("shoal", stdin, stderr, stderr);
  if (editor_ == nullptr) return;
  history_ = history_init();
  HistEvent event;
  ::history(history_, &event, H_SETSIZE, kHistoryLines);
  el_set(editor_, EL_PROMPT, FirstPrompt);
  el_set(editor_, EL_EDITOR, "emacs");
  el_set(editor_, EL_CLIENTDATA, this);
  el_set(editor_, EL_GETCFN, &LineReader::ReadCharacter);
  el_set(editor_, EL_SIGNAL, 1);  // a resized window, Ctrl-Z, and a sane terminal after Ctrl-C
  el_set(editor_, EL_HIST, ::history, history_);
}

LineReader::~LineReader() {
  if (editor_ != nullptr) el_end(editor_);
  if (history_ != nullptr) history_end(history_);
}

std::optional<std::string> LineReader::Next() {
  std::string message;
  if (editor_ == nullptr) {
    if (!std::getline(std::cin, message)) return std::nullopt;
    return message;
  }
  el_set(editor_, EL_PROMPT, FirstPrompt);
  while (message.size() < kMaxMessageBytes) {
    std::string line;
    const Outcome outcome = ReadLine(line);
    if (outcome == Outcome::kEnd) return std::nullopt;
    if (outcome == Outcome::kCleared) {
      message.clear();
      el_set(editor_, EL_PROMPT, FirstPrompt);
      continue;
    }
    const bool goes_on = !line.empty() && line.back() == '\\';
    if (goes_on) line.pop_back();
    message += line;
    if (!goes_on && !InputWaits()) break;
    message += '\n';
    el_set(editor_, EL_PROMPT, NextPrompt);
  }
  return message;
}

LineReader::Outcome LineReader::ReadLine(std::string& line) {
  int count = 0;
  const char* text = el_gets(editor_, &count);
  if (text == nullptr || count <= 0) {
    const LineInfo* left = el_line(editor_);
    const bool has_text = text == nullptr && left != nullptr && left->lastchar > left->buffer;
    std::fputc('\n', stderr);
    return interrupt_.Take() && has_text ? Outcome::kCleared : Outcome::kEnd;
  }
  line.assign(text, count);
  while (!line.empty() && line.back() == '\n') line.pop_back();
  Remember(line);
  return Outcome::kLine;
}

void LineReader::Remember(const std::string& line) {
  if (line.empty()) return;
  HistEvent event;
  ::history(history_, &event, H_ENTER, line.c_str());
}

}  // namespace shoal
