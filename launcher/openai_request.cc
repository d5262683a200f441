#include "launcher/openai_request.h"

#include <algorithm>
#include <cmath>
#include <ctime>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"
#include "launcher/json_grammar.h"
#include "launcher/json_text.h"
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kMaxDepth = 64;
constexpr size_t kMaxMessages = 4096;
constexpr size_t kMaxStops = 16;
constexpr size_t kMaxStopBytes = 1024;
constexpr size_t kMaxBias = 1024;
constexpr size_t kMaxTools = 128;
constexpr int kMaxChoices = 64;
constexpr size_t kMaxInputs = 512;  // of an embeddings request
constexpr int kMaxTopLogprobs = 20;
constexpr int kDefaultCompletionTokens = 16;  // as OpenAI has it
constexpr int kMaxTokens = 1 << 24;
constexpr char kParamPayload[] = "shoal/param";

absl::Status Bad(std::string_view param, const std::string& message) {
  absl::Status s = absl::InvalidArgumentError(message);
  s.SetPayload(kParamPayload, absl::Cord(std::string(param)));
  return s;
}

absl::StatusOr<Json> ParseBody(std::string_view body) {
  SHOAL_RETURN_IF_ERROR(CheckJsonDepth(body, kMaxDepth));
  Json json = Json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) {
    return absl::InvalidArgumentError("the body is not valid JSON (in UTF-8)");
  }
  if (!json.is_object()) return absl::InvalidArgumentError("the body must be a JSON object");
  return json;
}

bool Given(const Json& j, const char* key) { return j.contains(key) && !j[key].is_null(); }

template <typename T>
absl::Status ReadNumber(const Json& j, const char* key, double low, double high, T* out) {
  if (!Given(j, key)) return absl::OkStatus();
  const Json& v = j[key];
  const double x = v.is_number() ? v.get<double>() : std::nan("");
  if (!(x >= low && x <= high)) {
    return Bad(key, absl::StrCat(key, " must be a number from ", low, " to ", high));
  }
  *out = static_cast<T>(x);
  return absl::OkStatus();
}

absl::Status ReadInteger(const Json& j, const char* key, int64_t low, int64_t high, int* out) {
  if (!Given(j, key)) return absl::OkStatus();
  const Json& v = j[key];
  if (!v.is_number_integer() || v < low || v > high) {
    return Bad(key, absl::StrCat(key, " must be an integer from ", low, " to ", high));
  }
  *out = v.get<int>();
  return absl::OkStatus();
}

absl::Status ReadBool(const Json& j, const char* key, bool* out) {
  if (!Given(j, key)) return absl::OkStatus();
  if (!j[key].is_boolean()) return Bad(key, absl::StrCat(key, " must be true or false"));
  *out = j[key].get<bool>();
  return absl::OkStatus();
}

absl::Status ReadSampling(const Json& j, const ModelContext& model, OpenAiRequest* r) {
  SamplingParams& p = r->generate.sampling;
  // OpenAI's defaults, not the command line's.
  p.temperature = 1;
  p.top_k = 0;
  p.top_p = 1;
  p.min_p = 0;
  p.penalty_last_n = -1;
  SHOAL_RETURN_IF_ERROR(ReadNumber(j, "temperature", 0, 2, &p.temperature));
  SHOAL_RETURN_IF_ERROR(ReadNumber(j, "top_p", 0, 1, &p.top_p));
  SHOAL_RETURN_IF_ERROR(ReadNumber(j, "min_p", 0, 1, &p.min_p));
  SHOAL_RETURN_IF_ERROR(ReadNumber(j, "presence_penalty", -2, 2, &p.presence_penalty));
  SHOAL_RETURN_IF_ERROR(ReadNumber(j, "frequency_penalty", -2, 2, &p.frequency_penalty));
  for (const char* key : {"repetition_penalty", "repeat_penalty"}) {
    SHOAL_RETURN_IF_ERROR(ReadNumber(j, key, 0.01, 10, &p.repeat_penalty));
  }
  SHOAL_RETURN_IF_ERROR(ReadInteger(j, "top_k", -1, 1 << 20, &p.top_k));
  p.top_k = std::max(p.top_k, 0);
  if (Given(j, "seed")) {
    const Json& seed = j["seed"];
    if (!seed.is_number_integer()) return Bad("seed", "seed must be an integer of 64 bits");
    p.seed = seed.is_number_unsigned() ? seed.get<uint64_t>()
                                       : static_cast<uint64_t>(seed.get<int64_t>());
    r->random_seed = false;
  }
  if (!Given(j, "logit_bias")) return absl::OkStatus();
  const Json& bias = j["logit_bias"];
  if (!bias.is_object() || bias.size() > kMaxBias) {
    return Bad("logit_bias", absl::StrCat("logit_bias must be an object of at most ", kMaxBias,
                                          " token ids and their bias"));
  }
  for (const auto& [key, value] : bias.items()) {
    int32_t token = 0;
    if (!absl::SimpleAtoi(key, &token) || token < 0 || token >= model.tokenizer->vocab_size()) {
      return Bad("logit_bias",
                 absl::StrCat("logit_bias: '", ClipText(key, 40), "' is not a token id below ",
                              model.tokenizer->vocab_size()));
    }
    float x = 0;
    if (absl::Status s = ReadNumber(bias, key.c_str(), -100, 100, &x); !s.ok()) {
      return Bad("logit_bias", "logit_bias values must be numbers from -100 to 100");
    }
    p.logit_bias.emplace_back(token, x);
  }
  return absl::OkStatus();
}

absl::Status ReadStop(const Json& j, OpenAiRequest* r) {
  if (!Given(j, "stop")) return absl::OkStatus();
  const Json list = j["stop"].is_array() ? j["stop"] : Json::array({j["stop"]});
  if (list.size() > kMaxStops) {
    return Bad("stop", absl::StrCat("at most ", kMaxStops, " stop strings"));
  }
  for (const Json& s : list) {
    if (!s.is_string() || s.get_ref<const std::string&>().empty() ||
        s.get_ref<const std::string&>().size() > kMaxStopBytes) {
      return Bad("stop", absl::StrCat("stop must be a string or a list of strings of 1 to ",
                                      kMaxStopBytes, " bytes"));
    }
    r->generate.stop.push_back(s.get<std::string>());
  }
  return absl::OkStatus();
}

absl::Status ReadResponseFormat(const Json& j, OpenAiRequest* r) {
  if (!Given(j, "response_format")) return absl::OkStatus();
  const Json& f = j["response_format"];
  const std::string type = f.is_object() && f.contains("type") && f["type"].is_string()
                               ? f["type"].get<std::string>()
                               : "";
  if (type == "text") return absl::OkStatus();
  if (type == "json_object") {
    r->generate.json_schema = R"({"type":"object"})";
    return absl::OkStatus();
  }
  if (type != "json_schema") {
    return Bad("response_format", "response_format.type must be text, json_object or json_schema");
  }
  if (!f.contains("json_schema") || !f["json_schema"].is_object() ||
      !f["json_schema"].contains("schema")) {
    return Bad("response_format", "response_format.json_schema.schema is missing");
  }
  r->generate.json_schema = DumpJson(f["json_schema"]["schema"]);
  return absl::OkStatus();
}

// Compiled here only to be refused early; the engine compiles it for itself.
absl::Status CheckSchema(const std::string& schema, const char* param) {
  if (schema.empty()) return absl::OkStatus();
  const auto grammar = JsonGrammar::FromSchema(schema);
  if (grammar.ok()) return absl::OkStatus();
  return Bad(param, std::string(grammar.status().message()));
}

absl::Status ReadCommon(const Json& j, const ModelContext& model, OpenAiRequest* r) {
  if (Given(j, "model")) {
    if (!j["model"].is_string()) return Bad("model", "model must be a string");
    const auto name = j["model"].get<std::string>();
    if (name != model.name && name != "default" && !name.empty()) {
      absl::Status s =
          absl::NotFoundError(absl::StrCat("the model '", ClipText(name, 100),
                                           "' does not exist; this server has '", model.name, "'"));
      s.SetPayload(kParamPayload, absl::Cord("model"));
      return s;
    }
  }
  SHOAL_RETURN_IF_ERROR(ReadSampling(j, model, r));
  SHOAL_RETURN_IF_ERROR(ReadStop(j, r));
  SHOAL_RETURN_IF_ERROR(ReadBool(j, "stream", &r->stream));
  SHOAL_RETURN_IF_ERROR(ReadBool(j, "ignore_eos", &r->generate.ignore_eos));
  SHOAL_RETURN_IF_ERROR(ReadInteger(j, "n", 1, kMaxChoices, &r->n));
  if (Given(j, "stream_options")) {
    if (!j["stream_options"].is_object()) {
      return Bad("stream_options", "stream_options must be an object");
    }
    if (!r->stream) return Bad("stream_options", "stream_options needs stream: true");
    SHOAL_RETURN_IF_ERROR(ReadBool(j["stream_options"], "include_usage", &r->include_usage));
  }
  SHOAL_RETURN_IF_ERROR(ReadResponseFormat(j, r));
  return CheckSchema(r->generate.json_schema, "response_format");
}

absl::StatusOr<std::string> FlattenContent(const Json& content) {
  if (content.is_null()) return std::string();
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) return Bad("messages", "content must be a string or a list of parts");
  std::string text;
  for (const Json& part : content) {
    if (!part.is_object() || !part.contains("type") || part["type"] != "text" ||
        !part.contains("text") || !part["text"].is_string()) {
      return Bad("messages",
                 "content parts must be {\"type\": \"text\", \"text\": ...}; this model "
                 "reads nothing else");
    }
    text += part["text"].get_ref<const std::string&>();
  }
  return text;
}

// Messages as templates expect them: text content, and the arguments of calls as objects.
absl::StatusOr<Json> ReadMessages(const Json& j) {
  if (!Given(j, "messages") || !j["messages"].is_array() || j["messages"].empty()) {
    return Bad("messages", "messages must be a list with at least one message");
  }
  if (j["messages"].size() > kMaxMessages) {
    return Bad("messages", absl::StrCat("at most ", kMaxMessages, " messages"));
  }
  Json messages = Json::array();
  for (const Json& m : j["messages"]) {
    if (!m.is_object() || !m.contains("role") || !m["role"].is_string()) {
      return Bad("messages", "each message needs a role");
    }
    auto role = m["role"].get<std::string>();
    if (role == "developer") role = "system";
    if (role != "system" && role != "user" && role != "assistant" && role != "tool") {
      return Bad("messages", absl::StrCat("unknown role '", ClipText(role, 40), "'"));
    }
    Json message = m;
    message["role"] = role;
    SHOAL_ASSIGN_OR_RETURN(std::string content,
                           FlattenContent(m.contains("content") ? m["content"] : Json()));
    message["content"] = std::move(content);
    if (m.contains("tool_calls") && m["tool_calls"].is_array()) {
      for (Json& call : message["tool_calls"]) {
        if (!call.is_object() || !call.contains("function") || !call["function"].is_object()) {
          return Bad("messages", "tool_calls must hold {\"function\": {...}}");
        }
        Json& function = call["function"];
        if (!function.contains("arguments") || !function["arguments"].is_string()) continue;
        const auto& text = function["arguments"].get_ref<const std::string&>();
        if (!CheckJsonDepth(text, kMaxDepth).ok()) continue;
        Json parsed = Json::parse(text, nullptr, /*allow_exceptions=*/false);
        if (parsed.is_object()) function["arguments"] = std::move(parsed);
      }
    }
    messages.push_back(std::move(message));
  }
  return messages;
}

absl::StatusOr<std::string> FunctionName(const Json& tool) {
  if (tool.is_object() && tool.contains("function") && tool["function"].is_object() &&
      tool["function"].contains("name") && tool["function"]["name"].is_string()) {
    return tool["function"]["name"].get<std::string>();
  }
  return Bad("tools", "each tool must be {\"type\": \"function\", \"function\": {\"name\": ...}}");
}

Json Member(const Json& j, const char* key) {
  return j.is_object() && j.contains(key) ? j[key] : Json();
}

// Whether a value of the schema is a text, or null and else a text.
bool TakesOnlyText(const Json& schema) {
  std::vector<Json> types;
  const auto add = [&types](const Json& type) {
    if (!type.is_array()) return types.push_back(type);
    types.insert(types.end(), type.begin(), type.end());
  };
  const Json choices = Member(schema, "anyOf");  // as pydantic writes optional parameters
  if (choices.is_array()) {
    for (const Json& choice : choices) add(Member(choice, "type"));
  } else {
    add(Member(schema, "type"));
  }
  return std::find(types.begin(), types.end(), "string") != types.end() &&
         std::all_of(types.begin(), types.end(),
                     [](const Json& t) { return t == "string" || t == "null"; });
}

// Of a function, those whose values are texts.
std::vector<std::string> TextParameters(const Json& function) {
  std::vector<std::string> names;
  const Json properties = Member(Member(function, "parameters"), "properties");
  if (!properties.is_object()) return names;
  for (const auto& [name, schema] : properties.items()) {
    if (TakesOnlyText(schema)) names.push_back(name);
  }
  return names;
}

// References of a schema start at its root; it is put into a larger one, at `place`.
void MoveReferences(Json& schema, const std::string& place) {
  if (schema.is_object() && schema.contains("$ref") && schema["$ref"].is_string()) {
    const auto target = schema["$ref"].get<std::string>();
    if (!target.empty() && target[0] == '#') schema["$ref"] = "#" + place + target.substr(1);
  }
  if (!schema.is_structured()) return;
  for (Json& child : schema) MoveReferences(child, place);  // kMaxDepth bounds the recursion
}

// A call as a schema: the name fixed, the arguments as the function wants them.
Json CallSchema(const Json& function, const std::string& place) {
  Json arguments =
      function.contains("parameters") ? function["parameters"] : Json::object({{"type", "object"}});
  MoveReferences(arguments, place + "/properties/arguments");
  return {{"type", "object"},
          {"properties",
           {{"name", {{"const", function["name"]}}}, {"arguments", std::move(arguments)}}},
          {"required", {"name", "arguments"}},
          {"additionalProperties", false}};
}

// Sets the tools for the template (null: none) and what the answer may be.
absl::Status ReadTools(const Json& j, Json* tools, OpenAiRequest* r) {
  *tools = nullptr;
  if (!Given(j, "tools")) return absl::OkStatus();
  const Json& list = j["tools"];
  if (!list.is_array() || list.size() > kMaxTools) {
    return Bad("tools", absl::StrCat("tools must be a list of at most ", kMaxTools));
  }
  std::string choice = "auto";
  std::string named;
  if (Given(j, "tool_choice")) {
    const Json& c = j["tool_choice"];
    if (c.is_string()) {
      choice = c.get<std::string>();
    } else {
      choice = "required";
      absl::StatusOr<std::string> name = FunctionName(c);
      if (!name.ok()) return Bad("tool_choice", "tool_choice must be a name or name a function");
      named = *name;
    }
  }
  if (choice != "auto" && choice != "none" && choice != "required") {
    return Bad("tool_choice", "tool_choice must be auto, none, required or a function");
  }
  if (choice == "none" || list.empty()) return absl::OkStatus();
  Json options = Json::array();
  for (const Json& tool : list) {
    SHOAL_ASSIGN_OR_RETURN(const std::string name, FunctionName(tool));
    if (!named.empty() && name != named) continue;
    r->functions.push_back({name, TextParameters(tool["function"])});
    const bool alone = !named.empty() || list.size() == 1;
    options.push_back(
        CallSchema(tool["function"], alone ? "" : absl::StrCat("/anyOf/", options.size())));
  }
  if (r->functions.empty()) return Bad("tool_choice", "tool_choice names no function of tools");
  *tools = list;
  // Marks of calls are control tokens in many vocabularies.
  r->generate.render_special = true;
  if (choice != "required") return absl::OkStatus();
  r->generate.json_schema =
      DumpJson(options.size() == 1 ? options[0] : Json{{"anyOf", std::move(options)}});
  r->forced_call = true;
  return CheckSchema(r->generate.json_schema, "tools");
}

absl::StatusOr<std::vector<int32_t>> ReadTokenIds(const Json& list, const ModelContext& model,
                                                  const char* param) {
  std::vector<int32_t> ids;
  for (const Json& t : list) {
    if (!t.is_number_integer() || t < 0 || t >= model.tokenizer->vocab_size()) {
      return Bad(param, absl::StrCat("token ids must be integers from 0 to ",
                                     model.tokenizer->vocab_size() - 1));
    }
    ids.push_back(t.get<int32_t>());
  }
  return ids;
}

// A string, token ids, or a list of either.
absl::StatusOr<std::vector<std::vector<int32_t>>> ReadInputs(const Json& input,
                                                             const ModelContext& model,
                                                             const char* param, size_t most,
                                                             std::vector<std::string>* texts) {
  const bool single =
      input.is_string() || (input.is_array() && !input.empty() && input[0].is_number());
  const Json list = single ? Json::array({input}) : input;
  if (!list.is_array() || list.empty() || list.size() > most) {
    return Bad(param, absl::StrCat(param, " must be a string, token ids, or a list of 1 to ", most,
                                   " of either"));
  }
  std::vector<std::vector<int32_t>> out;
  for (const Json& item : list) {
    if (item.is_string()) {
      const auto& text = item.get_ref<const std::string&>();
      SHOAL_ASSIGN_OR_RETURN(std::vector<int32_t> ids, model.tokenizer->Encode(text, true, false));
      out.push_back(std::move(ids));
      texts->push_back(text);
    } else if (item.is_array()) {
      SHOAL_ASSIGN_OR_RETURN(std::vector<int32_t> ids, ReadTokenIds(item, model, param));
      texts->push_back(model.tokenizer->Decode(ids, false));
      out.push_back(std::move(ids));
    } else {
      return Bad(param, absl::StrCat(param, " must hold strings or lists of token ids"));
    }
    if (out.back().empty()) return Bad(param, absl::StrCat(param, " is empty"));
  }
  return out;
}

absl::Status ReadMaxTokens(const Json& j, const char* key, int* out) {
  return ReadInteger(j, key, 1, kMaxTokens, out);
}

}  // namespace

std::string ParamOf(const absl::Status& status) {
  const absl::optional<absl::Cord> payload = status.GetPayload(kParamPayload);
  return payload.has_value() ? std::string(*payload) : "";
}

absl::StatusOr<OpenAiRequest> ParseChatRequest(std::string_view body, const ModelContext& model) {
  SHOAL_ASSIGN_OR_RETURN(const Json j, ParseBody(body));
  OpenAiRequest r;
  r.chat = true;
  SHOAL_RETURN_IF_ERROR(ReadCommon(j, model, &r));
  SHOAL_RETURN_IF_ERROR(ReadMaxTokens(j, "max_tokens", &r.generate.max_tokens));
  SHOAL_RETURN_IF_ERROR(ReadMaxTokens(j, "max_completion_tokens", &r.generate.max_tokens));
  SHOAL_RETURN_IF_ERROR(ReadBool(j, "logprobs", &r.logprobs));
  int top = 0;
  SHOAL_RETURN_IF_ERROR(ReadInteger(j, "top_logprobs", 0, kMaxTopLogprobs, &top));
  if (Given(j, "top_logprobs") && !r.logprobs) {
    return Bad("top_logprobs", "top_logprobs needs logprobs: true");
  }
  if (r.logprobs) r.generate.sampling.logprobs = top;
  Json tools;
  SHOAL_RETURN_IF_ERROR(ReadTools(j, &tools, &r));
  SHOAL_ASSIGN_OR_RETURN(const Json messages, ReadMessages(j));
  const ChatTemplate* chat_template = model.chat_template;
  if (!tools.is_null() && model.tool_use_template != nullptr) {
    chat_template = model.tool_use_template;
  }
  if (chat_template == nullptr) {
    return Bad("messages", "this model has no chat template: use /v1/completions");
  }
  ChatTemplateOptions options;
  const Tokenizer& tokenizer = *model.tokenizer;
  options.bos_token = std::string(tokenizer.TokenText(tokenizer.bos()));
  options.eos_token = std::string(tokenizer.TokenText(tokenizer.eos()));
  if (Given(j, "chat_template_kwargs")) {
    if (!j["chat_template_kwargs"].is_object()) {
      return Bad("chat_template_kwargs", "chat_template_kwargs must be an object");
    }
    options.extra = j["chat_template_kwargs"];
  }
  absl::StatusOr<std::string> prompt = chat_template->Render(messages, tools, options);
  if (!prompt.ok()) {
    return Bad("messages", absl::StrCat("the chat template refuses this conversation: ",
                                        prompt.status().message()));
  }
  SHOAL_ASSIGN_OR_RETURN(std::vector<int32_t> ids, tokenizer.Encode(*prompt, false, true));
  r.prompts.push_back(std::move(ids));
  r.reasoning = ReasoningFormatOf(chat_template->source());
  r.in_thought = EndsInThought(r.reasoning, *prompt);
  if (NeedsMarks(r.reasoning)) r.generate.render_special = true;
  return r;
}

absl::StatusOr<OpenAiRequest> ParseCompletionRequest(std::string_view body,
                                                     const ModelContext& model) {
  SHOAL_ASSIGN_OR_RETURN(const Json j, ParseBody(body));
  OpenAiRequest r;
  SHOAL_RETURN_IF_ERROR(ReadCommon(j, model, &r));
  r.generate.max_tokens = kDefaultCompletionTokens;
  SHOAL_RETURN_IF_ERROR(ReadMaxTokens(j, "max_tokens", &r.generate.max_tokens));
  SHOAL_RETURN_IF_ERROR(ReadBool(j, "echo", &r.echo));
  if (Given(j, "logprobs")) {
    SHOAL_RETURN_IF_ERROR(
        ReadInteger(j, "logprobs", 0, kMaxTopLogprobs, &r.generate.sampling.logprobs));
    r.logprobs = true;
  }
  if (Given(j, "suffix") && !j["suffix"].empty()) {
    return Bad("suffix", "suffix is not supported");
  }
  int best_of = r.n;
  SHOAL_RETURN_IF_ERROR(ReadInteger(j, "best_of", 1, kMaxChoices, &best_of));
  if (best_of != r.n) return Bad("best_of", "best_of other than n is not supported");
  if (!j.contains("prompt")) return Bad("prompt", "prompt is missing");
  SHOAL_ASSIGN_OR_RETURN(r.prompts,
                         ReadInputs(j["prompt"], model, "prompt", kMaxChoices, &r.prompt_texts));
  if (static_cast<int>(r.prompts.size()) * r.n > kMaxChoices) {
    return Bad("n", absl::StrCat("at most ", kMaxChoices, " choices over all prompts"));
  }
  return r;
}

absl::StatusOr<std::vector<int32_t>> ParseTokenizeRequest(std::string_view body,
                                                          const ModelContext& model) {
  SHOAL_ASSIGN_OR_RETURN(const Json j, ParseBody(body));
  // vLLM calls it prompt, llama.cpp content.
  const char* key = Given(j, "content") ? "content" : Given(j, "text") ? "text" : "prompt";
  if (!Given(j, key) || !j[key].is_string()) {
    return Bad("content", "content (or prompt, or text) must be a string");
  }
  bool add_special = std::string_view(key) == "prompt";
  bool parse_special = false;
  SHOAL_RETURN_IF_ERROR(ReadBool(j, "add_special", &add_special));
  SHOAL_RETURN_IF_ERROR(ReadBool(j, "add_special_tokens", &add_special));
  SHOAL_RETURN_IF_ERROR(ReadBool(j, "parse_special", &parse_special));
  return model.tokenizer->Encode(j[key].get_ref<const std::string&>(), add_special, parse_special);
}

absl::StatusOr<std::string> ParseDetokenizeRequest(std::string_view body,
                                                   const ModelContext& model) {
  SHOAL_ASSIGN_OR_RETURN(const Json j, ParseBody(body));
  if (!Given(j, "tokens") || !j["tokens"].is_array()) {
    return Bad("tokens", "tokens must be a list of token ids");
  }
  SHOAL_ASSIGN_OR_RETURN(const std::vector<int32_t> ids,
                         ReadTokenIds(j["tokens"], model, "tokens"));
  return model.tokenizer->Decode(ids, /*render_special=*/false);
}

absl::StatusOr<EmbeddingRequest> ParseEmbeddingRequest(std::string_view body,
                                                       const ModelContext& model) {
  SHOAL_ASSIGN_OR_RETURN(const Json j, ParseBody(body));
  EmbeddingRequest r;
  OpenAiRequest common;
  SHOAL_RETURN_IF_ERROR(ReadCommon(j, model, &common));
  if (Given(j, "encoding_format")) {
    if (j["encoding_format"] != "float" && j["encoding_format"] != "base64") {
      return Bad("encoding_format", "encoding_format must be float or base64");
    }
    r.base64 = j["encoding_format"] == "base64";
  }
  if (Given(j, "dimensions")) return Bad("dimensions", "dimensions is not supported");
  if (!j.contains("input")) return Bad("input", "input is missing");
  std::vector<std::string> texts;
  SHOAL_ASSIGN_OR_RETURN(r.inputs, ReadInputs(j["input"], model, "input", kMaxInputs, &texts));
  return r;
}

}  // namespace shoal
