#include <algorithm>
#include <charconv>
#include <limits>
#include <unordered_map>

#include "plan.hpp"

namespace pipeweaver {
namespace {

struct NotCanonical {};

bool is_digit(char c) { return c >= '0' && c <= '9'; }

bool is_word(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || c == '-';
  });
}

// Canonical JSON from left to right: no spaces, no escapes, whole numbers without leading zeros.
class Cursor {
 public:
  explicit Cursor(std::string_view data) : data_(data) {}

  void expect(std::string_view literal) {
    if (!skip(literal)) throw NotCanonical{};
  }

  bool skip(std::string_view literal) {
    if (data_.substr(at_, literal.size()) != literal) return false;
    at_ += literal.size();
    return true;
  }

  i64 number() {
    i64 value = 0;
    const char* begin = data_.data() + at_;
    const char* end = data_.data() + data_.size();
    if (begin == end || !is_digit(*begin)) throw NotCanonical{};
    const auto [stop, error] = std::from_chars(begin, end, value);
    if (error != std::errc{} || (*begin == '0' && stop != begin + 1)) throw NotCanonical{};
    at_ += stop - begin;
    return value;
  }

  i32 small() {
    const i64 value = number();
    if (value > std::numeric_limits<i32>::max()) throw NotCanonical{};
    return static_cast<i32>(value);
  }

  bool boolean() {
    if (skip("true")) return true;
    expect("false");
    return false;
  }

  std::string_view text() {
    expect("\"");
    const std::size_t begin = at_;
    while (at_ < data_.size() && data_[at_] != '"') {
      if (data_[at_] < ' ' || data_[at_] > '~' || data_[at_] == '\\') throw NotCanonical{};
      ++at_;
    }
    const std::string_view found = data_.substr(begin, at_ - begin);
    expect("\"");
    return found;
  }

  // Calls `read` for every element up to the closing bracket.
  template <typename Read>
  void list(Read read, char open = '[', char close = ']') {
    expect(std::string_view(&open, 1));
    if (skip(std::string_view(&close, 1))) return;
    do {
      read();
    } while (skip(","));
    expect(std::string_view(&close, 1));
  }

  bool at_end() const { return at_ == data_.size(); }

 private:
  std::string_view data_;
  std::size_t at_ = 0;
};

template <std::size_t N>
i32 index_of(const std::array<std::string_view, N>& names, std::string_view name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) throw NotCanonical{};
  return static_cast<i32>(found - names.begin());
}

class Reader {
 public:
  explicit Reader(std::string_view data) : in_(data) {}

  Plan read() {
    in_.expect(R"({"format":"pipeweaver.plan/1","pipeline_size":)");
    plan_.ranks = in_.small();
    in_.expect(R"(,"modules":)");
    in_.list([this] { read_module(); }, '{', '}');
    in_.expect(R"(,"forward_only":)");
    plan_.forward_only = in_.boolean();
    in_.expect(R"(,"memory_capacity_bytes":)");
    in_.list([this] { plan_.capacity.push_back(in_.number()); });
    in_.expect(R"(,"makespan_ns":)");
    plan_.makespan = in_.number();
    in_.expect(R"(,"passes":)");
    in_.list([this] { read_pass(); });
    name_producers();
    in_.expect(R"(,"messages":)");
    in_.list([this] { read_message(); });
    in_.expect(R"(,"ranks":)");
    in_.list([this] {
      plan_.actions.emplace_back();
      in_.list([this] { plan_.actions.back().push_back(action()); });
    });
    in_.expect("}\n");
    const auto ranks = static_cast<std::size_t>(plan_.ranks);
    if (!in_.at_end() || plan_.ranks < 1 || plan_.capacity.size() != ranks ||
        plan_.actions.size() != ranks) {
      throw NotCanonical{};
    }
    return std::move(plan_);
  }

 private:
  void read_module() {
    const std::string_view name = in_.text();
    in_.expect(":");
    const i32 segments = in_.small();
    const auto number = static_cast<i32>(plan_.modules.size());
    if (!is_word(name) || segments < 1 || !module_.emplace(name, number).second) {
      throw NotCanonical{};
    }
    plan_.modules.emplace_back(name);
    plan_.segments.push_back(segments);
  }

  struct Key {
    i32 microbatch, module, sub;
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    std::size_t operator()(const Key& key) const {
      const auto mixed = (static_cast<std::uint64_t>(key.microbatch) << 32) ^
                         (static_cast<std::uint64_t>(key.module) << 20) ^
                         static_cast<std::uint64_t>(key.sub);
      return static_cast<std::size_t>(mixed * 0x9E3779B97F4A7C15ULL >> 16);
    }
  };

  Key key() {
    in_.expect("[");
    const i32 microbatch = in_.small();
    in_.expect(",");
    const i32 module = module_of(in_.text());
    in_.expect(",");
    const i32 sub = in_.small();
    in_.expect("]");
    return {microbatch, module, sub};
  }

  i32 module_of(std::string_view name) const {
    const auto found = module_.find(name);
    if (found == module_.end()) throw NotCanonical{};
    return found->second;
  }

  i32 pass_of(const Key& key) const {
    const auto found = pass_.find(key);
    if (found == pass_.end()) throw NotCanonical{};
    return found->second;
  }

  std::vector<i64> shape() {
    std::vector<i64> found;
    in_.list([&] { found.push_back(in_.number()); });
    return found;
  }

  void read_pass() {
    in_.expect("[");
    const Key own = key();
    PlanPass pass{};
    pass.microbatch = own.microbatch;
    pass.module = own.module;
    pass.sub = own.sub;
    in_.expect(",");
    pass.stages = in_.small();
    in_.expect(",");
    after_.emplace_back();
    in_.list([this] { after_.back().push_back(key()); });
    in_.expect(",");
    pass.frozen = in_.boolean();
    in_.expect(",[");
    pass.item_start = in_.number();
    in_.expect(",");
    pass.item_stop = in_.number();
    in_.expect("],");
    pass.hidden_shape = shape();
    in_.expect(",");
    pass.output_shape = shape();
    in_.expect("]");
    const auto number = static_cast<i32>(plan_.passes.size());
    if (pass.item_stop < pass.item_start || !pass_.emplace(own, number).second) {
      throw NotCanonical{};
    }
    plan_.passes.push_back(std::move(pass));
  }

  // A pass may come after one that stands behind it.
  void name_producers() {
    for (std::size_t p = 0; p < plan_.passes.size(); ++p) {
      for (const Key& key : after_[p]) plan_.passes[p].after.push_back(pass_of(key));
    }
  }

  void read_message() {
    PlanMessage message{};
    in_.expect("[");
    message.source = op();
    in_.expect(",");
    message.target = op();
    in_.expect(",");
    message.source_rank = in_.small();
    in_.expect(",");
    message.target_rank = in_.small();
    in_.expect(",");
    message.sequence = in_.small();
    in_.expect(",");
    message.shape = shape();
    in_.expect(",");
    message.dtype = index_of(kElementTypes, in_.text());
    in_.expect("]");
    plan_.messages.push_back(std::move(message));
  }

  PlanAction action() {
    PlanAction made{};
    in_.expect("[");
    made.kind = index_of(kActionNames, in_.text());
    in_.expect(",");
    if (is_compute(made.kind)) {
      made.op = op();
      in_.expect(",");
      made.strategy = strategy_of(in_.text());
      in_.expect(",");
      made.memory = in_.number();
    } else {
      made.begin = static_cast<i32>(plan_.moved.size());
      do {
        plan_.moved.push_back(in_.small());
      } while (in_.skip(","));
      made.end = static_cast<i32>(plan_.moved.size());
    }
    in_.expect("]");
    return made;
  }

  i32 strategy_of(std::string_view name) {
    const auto [found, added] = strategy_.emplace(name, plan_.strategies.size());
    if (added) plan_.strategies.emplace_back(name);
    return found->second;
  }

  // `vision0.F3`, `clip2:0.B3.1` (`ir/text.py`).
  NamedOp op() {
    const std::string_view text = in_.text();
    const std::size_t dot = text.find('.');
    if (dot == std::string_view::npos || dot + 2 >= text.size()) throw NotCanonical{};
    const std::string_view stage = text.substr(0, dot);
    std::size_t split = stage.find(':');
    std::string_view module = stage.substr(0, split);
    if (split == std::string_view::npos) {
      split = stage.size();
      while (split > 0 && is_digit(stage[split - 1])) --split;
      module = stage.substr(0, split);
    } else {
      // A colon stands behind names that end in a digit alone.
      if (module.empty() || !is_digit(module.back())) throw NotCanonical{};
      ++split;
    }
    NamedOp found;
    found.kind = static_cast<i32>(std::string_view("FBW").find(text[dot + 1]));
    if (found.kind < 0) throw NotCanonical{};
    found.stage = whole(stage.substr(split));
    const std::string_view share = text.substr(dot + 2);
    const std::size_t second = share.find('.');
    const i32 sub = second == std::string_view::npos ? 0 : whole(share.substr(second + 1));
    if (second != std::string_view::npos && sub == 0) throw NotCanonical{};
    found.pass = pass_of({whole(share.substr(0, second)), module_of(module), sub});
    return found;
  }

  static i32 whole(std::string_view digits) {
    Cursor one(digits);
    const i32 value = one.small();
    if (!one.at_end()) throw NotCanonical{};
    return value;
  }

  Cursor in_;
  Plan plan_;
  std::unordered_map<std::string_view, i32> module_, strategy_;
  std::unordered_map<Key, i32, Hash> pass_;
  std::vector<std::vector<Key>> after_;
};

}  // namespace

std::optional<Plan> read_plan(std::string_view data) {
  try {
    return Reader(data).read();
  } catch (const NotCanonical&) {
    return std::nullopt;
  }
}

}  // namespace pipeweaver
