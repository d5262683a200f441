#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "launcher/jinja/template.h"
#include "nlohmann/json.hpp"

namespace shoal::jinja {
namespace {

using nlohmann::ordered_json;
using ::testing::HasSubstr;

constexpr std::time_t kNow = 1718000000;  // 2024-06-10 06:13:20 UTC

absl::StatusOr<std::string> Render(const std::string& source, const ordered_json& variables = {},
                                   const Limits& limits = {}) {
  auto parsed = Template::Parse(source);
  if (!parsed.ok()) return parsed.status();
  return parsed->Render(variables, limits, kNow);
}

std::string Message(const absl::StatusOr<std::string>& result) {
  return std::string(result.status().message());
}

// What Jinja prints for each case; jinja_reference_test.py holds the file to it.
TEST(JinjaTest, PrintsWhatJinjaPrints) {
  setenv("TZ", "UTC", 1);
  std::ifstream in("tests/launcher/jinja_cases.json");
  ASSERT_TRUE(in) << "run the test from the project's root";
  int checked = 0;
  for (const auto& group : ordered_json::parse(in)) {
    for (const auto& one : group["cases"]) {
      const auto found = Render(one[0].get<std::string>(), group["context"]);
      ++checked;
      if (one[1].is_null()) {
        EXPECT_FALSE(found.ok()) << one[0] << " printed '" << *found << "'";
      } else {
        ASSERT_TRUE(found.ok()) << one[0] << ": " << found.status();
        EXPECT_EQ(*found, one[1].get<std::string>()) << group["name"] << ": " << one[0];
      }
    }
  }
  EXPECT_GT(checked, 600);
}

// What the sandbox of transformers refuses and other engines allow: models rely on both.
TEST(JinjaTest, ListsCanGrow) {
  EXPECT_EQ(
      *Render("{% set l = [] %}{% for i in 'ab' %}{% set _ = l.append(i) %}{% endfor %}{{ l }}"),
      "['a', 'b']");
  EXPECT_EQ(
      *Render("{% set d = {} %}{% set _ = d.update({'a': 1}) %}{{ d }}{{ d.pop('a') }}{{ d }}"),
      "{'a': 1}1{}");
  EXPECT_EQ(*Render("{% set l = [1, 2, 3] %}{{ l.pop() }}{{ l.pop(0) }}{{ l }}"), "31[2]");
  EXPECT_EQ(*Render("{{ [1, 2, 3] | select('odd') | length }}"), "2");
}

TEST(JinjaTest, ErrorsNameTheirLine) {
  EXPECT_THAT(Message(Render("a\nb\n{{ 1 + }}")), HasSubstr("line 3: found '}}'"));
  EXPECT_THAT(Message(Render("{% if x %}\n\na")), HasSubstr("missing '{% endif %}'"));
  EXPECT_THAT(Message(Render("\n\n{{ x.y }}")), HasSubstr("line 3: 'x' is undefined"));
  EXPECT_THAT(Message(Render("{% macro m() %}\n{{ none + 1 }}{% endmacro %}\n\n{{ m() }}")),
              HasSubstr("line 2: '+' does not work on NoneType and int"));
  EXPECT_THAT(Message(Render("{#\n\n#}{{ raise_exception('no system role') }}")),
              HasSubstr("line 3: no system role"));
  EXPECT_THAT(Message(Render("\n{{ 'a' | nope }}")),
              HasSubstr("line 2: there is no filter 'nope'"));
  EXPECT_THAT(Message(Render("{% include 'x' %}")), HasSubstr("tag 'include' is not known"));
  EXPECT_THAT(Message(Render("{{ {'a': 1}.b.c }}")),
              HasSubstr("'dict object' has no attribute 'b'"));
}

TEST(JinjaTest, RunawayTemplatesAreStopped) {
  Limits limits;
  limits.steps = 200'000;
  limits.output_bytes = 100'000;
  limits.values = 50'000;
  const char* const cases[] = {
      "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
      "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
      "{% macro m() %}{{ m() ~ m() }}{% endmacro %}{{ m() }}",
      "{{ 'x' * 1000000000 }}",
      "{{ [1] * 1000000000 }}",
      "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% "
      "endfor %}",
      "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = ns.l + ns.l %}{% "
      "endfor %}",
      "{% for i in range(100000) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
      "{{ 'a'.replace('a', 'b' * 99999).replace('b', 'c' * 99999) }}",
      "{{ 'x'.center(1000000000) }}",
      "{{ '%1000000000s' % 'a' ~ 'x' * 99999 }}",
      "{{ [1] | batch(1000000000, 0) | list }}",
      "{{ 'a' | indent(1000000) }}",
      "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
      "{{ 9 ** 9 ** 9 }}",
      "{{ 9223372036854775807 + 1 }}",
  };
  for (const char* source : cases) {
    const auto found = Render(source, {}, limits);
    EXPECT_EQ(found.status().code(), absl::StatusCode::kInvalidArgument) << source;
  }
}

TEST(JinjaTest, TimeIsLimited) {
  Limits limits;
  limits.time = std::chrono::milliseconds(0);
  const auto found = Render("{% for a in range(9999) %}{{ a }}{% endfor %}", {}, limits);
  EXPECT_THAT(Message(found), HasSubstr("gave up after 0 ms"));
}

// A list may hold itself, and a value may be shared so often that walking it would never end.
TEST(JinjaTest, ValuesWithoutEndArePrintedAndCompared) {
  const auto self =
      Render("{% set l = [1] %}{% set _ = l.append(l) %}{{ l == l }}{{ l | string | length > 0 }}");
  EXPECT_EQ(*self, "TrueTrue");
  Limits limits;
  limits.output_bytes = 1'000'000;
  const std::string doubled =
      "{% set ns = namespace(x=[1]) %}{% for i in range(90) %}{% set ns.x = [ns.x, ns.x] %}{% "
      "endfor %}";
  EXPECT_FALSE(Render(doubled + "{{ ns.x }}", {}, limits).ok());
  EXPECT_FALSE(Render(doubled + "{{ ns.x | tojson }}", {}, limits).ok());
  EXPECT_FALSE(Render("{% set l = [] %}{% set _ = l.append(l) %}{{ l | tojson }}").ok());
}

std::string Nested(const std::string& open, const std::string& middle, const std::string& close,
                   int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += open;
  out += middle;
  for (int i = 0; i < times; ++i) out += close;
  return out;
}

TEST(JinjaTest, DeepSourcesAreRefusedNotFollowed) {
  EXPECT_EQ(*Render("{{ " + Nested("(", "1", ")", 20) + " }}"), "1");
  for (const std::string& source :
       {"{{ " + Nested("(", "1", ")", 100000) + " }}",
        "{{ " + Nested("[", "1", "]", 100000) + " }}", "{{ " + Nested("-", "1", "", 100000) + " }}",
        "{{ " + Nested("not ", "1", "", 100000) + " }}",
        "{{ " + Nested("1 + ", "1", "", 100000) + " }}",
        "{{ x" + Nested(".a", "", "", 100000) + " }}",
        "{{ x" + Nested("|upper", "", "", 100000) + " }}",
        "{{ " + Nested("1 if 1 else ", "2", "", 100000) + " }}",
        "{{ " + Nested("f(", "1", ")", 100000) + " }}",
        "{{ " + Nested("{1:", "1", "}", 100000) + " }}",
        Nested("{% if 1 %}", "x", "{% endif %}", 100000),
        Nested("{% for i in x %}", "x", "{% endfor %}", 100000),
        "{% for " + Nested("(", "a", ")", 100000) + " in x %}{% endfor %}"}) {
    EXPECT_EQ(Template::Parse(source).status().code(), absl::StatusCode::kInvalidArgument)
        << source.substr(0, 40);
  }
  const std::string chain =
      "{% if 0 %}" + Nested("{% elif 0 %}", "", "", 300) + "{% else %}x{% endif %}";
  EXPECT_EQ(*Render(chain), "x") << "a chain of elif is not deep";
  EXPECT_FALSE(Template::Parse(std::string(Template::kMaxSourceBytes + 1, 'x')).ok());
}

TEST(JinjaTest, DeepVariablesAreRefused) {
  ordered_json deep = 1;
  for (int i = 0; i < 1000; ++i) deep = ordered_json::array({std::move(deep)});
  EXPECT_THAT(Message(Render("x", {{"v", deep}})), HasSubstr("nests too deep"));
}

// A macro that outlives the scope it was defined in sees that scope empty, not gone.
TEST(JinjaTest, MacrosMayOutliveTheirScope) {
  EXPECT_EQ(
      *Render("{% set ns = namespace() %}{% for i in [1] %}{% macro m() %}[{{ i is defined }}]"
              "{% endmacro %}{% set ns.m = m %}{% endfor %}{{ ns.m() }}"),
      "[False]");
  EXPECT_EQ(*Render("{% set ns = namespace() %}{% for i in 'ab' %}{% set ns.l = loop %}{% endfor %}"
                    "{{ ns.l.index }}"),
            "2");
}

TEST(JinjaTest, ThreadsShareATemplate) {
  const auto parsed =
      Template::Parse("{% set x = [] %}{% for i in range(n) %}{{ x.append(i) or i }}{% endfor %}");
  ASSERT_TRUE(parsed.ok());
  std::vector<std::thread> threads;
  std::vector<std::string> found(4);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] { found[i] = *parsed->Render({{"n", i + 1}}, {}, kNow); });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(found, (std::vector<std::string>{"0", "01", "012", "0123"}));
}

}  // namespace
}  // namespace shoal::jinja
