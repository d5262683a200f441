// Messages from stdin: line editing, history and pasted paragraphs on a terminal, plain lines else.
#pragma once

#include <cwchar>
#include <optional>
#include <string>

// libedit's types, as histedit.h names them.
struct editline;
struct history;

namespace shoal {

class Interrupt;

// One at a time, on the thread that owns stdin.
class LineReader {
 public:
  // `interrupt` must outlive the reader. A Ctrl-C that cleared a line is taken from it; one that
  // came behind a finished line stays, for whoever answers the message.
  explicit LineReader(Interrupt& interrupt);
  ~LineReader();
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  // The next message, without its line break. On a terminal what is pasted with line breaks is one
  // message, a line that ends in a backslash goes on in the next, and Ctrl-C clears a line that has
  // text. nullopt at the end of input, on Ctrl-D, and on Ctrl-C in an empty line.
  std::optional<std::string> Next();

 private:
  enum class Outcome { kLine, kCleared, kEnd };
  Outcome ReadLine(std::string& line);
  // libedit's way to get a character: 1, 0 at the end of input, -1 on Ctrl-C.
  static int ReadCharacter(::editline* editor, wchar_t* out);
  void Remember(const std::string& line);

  Interrupt& interrupt_;
  ::editline* editor_ = nullptr;  // null: stdin is no terminal
  ::history* history_ = nullptr;
};

}  // namespace shoal
