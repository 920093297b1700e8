#include "wgsl.h"

#include <cctype>
#include <cstdlib>

namespace mlcawq {
namespace {

bool IsWord(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }

size_t SkipSpaces(const std::string& text, size_t at) {
  while (at < text.size() && std::isspace(static_cast<unsigned char>(text[at]))) ++at;
  return at;
}

// Past an index, a member or a swizzle, at the first character that is none.
size_t SkipAccessors(const std::string& text, size_t at) {
  for (at = SkipSpaces(text, at); at < text.size(); at = SkipSpaces(text, at)) {
    if (text[at] == '[') {
      for (int depth = 0; at < text.size();) {
        depth += (text[at] == '[') - (text[at] == ']');
        ++at;
        if (depth == 0) break;
      }
    } else if (text[at] == '.') {
      for (++at; at < text.size() && IsWord(text[at]);) ++at;
    } else {
      break;
    }
  }
  return at;
}

struct Declaration {
  size_t access;        // where "read" or "read_write" begins
  size_t access_size;
  std::string name;
  size_t end;           // behind the name
};

// `@binding(i) var<storage, ACCESS> NAME : ...`; false when there is none.
bool FindDeclaration(const std::string& wgsl, size_t binding, Declaration* found) {
  const std::string start = "@group(0) @binding(" + std::to_string(binding) + ") var<storage, ";
  size_t at = wgsl.find(start);
  if (at == std::string::npos) return false;
  found->access = at + start.size();
  const size_t close = wgsl.find('>', found->access);
  if (close == std::string::npos) return false;
  found->access_size = close - found->access;
  const size_t name = SkipSpaces(wgsl, close + 1);
  for (at = name; at < wgsl.size() && IsWord(wgsl[at]);) ++at;
  found->name = wgsl.substr(name, at - name);
  found->end = at;
  return true;
}

bool MayStore(const std::string& wgsl, const Declaration& buffer) {
  const std::string& name = buffer.name;
  for (size_t at = wgsl.find(name, buffer.end); at != std::string::npos;
       at = wgsl.find(name, at + 1)) {
    const size_t behind = at + name.size();
    if (IsWord(wgsl[at - 1]) || (behind < wgsl.size() && IsWord(wgsl[behind]))) continue;
    const size_t next = SkipAccessors(wgsl, behind);
    const bool indexed = next > behind && wgsl[SkipSpaces(wgsl, behind)] == '[';
    const bool taken = wgsl[at - 1] == '&';  // its address: an atomic, or a pointer
    const char after = next < wgsl.size() ? wgsl[next] : '\0';
    const bool second_equals = next + 1 < wgsl.size() && wgsl[next + 1] == '=';
    // "a[i] = x" and "a[i] += x", and neither "a[i] == x" nor "a[i] <= x".
    const bool assigned = after == '='
                              ? !second_equals
                              : second_equals && after != '!' && after != '<' && after != '>';
    if (!indexed || taken || assigned) return true;
  }
  return false;
}

}  // namespace

std::vector<std::string> BufferNames(const std::string& wgsl, size_t num_buffers) {
  std::vector<std::string> names(num_buffers);
  for (size_t i = 0; i < num_buffers; ++i) {
    Declaration buffer;
    if (FindDeclaration(wgsl, i, &buffer)) names[i] = buffer.name;
  }
  return names;
}

std::vector<bool> StoredBuffers(const std::string& wgsl, size_t num_buffers) {
  std::vector<bool> stored(num_buffers, true);
  for (size_t i = 0; i < num_buffers; ++i) {
    Declaration buffer;
    if (FindDeclaration(wgsl, i, &buffer)) stored[i] = MayStore(wgsl, buffer);
  }
  return stored;
}

std::string DeclareAccess(std::string wgsl, const std::vector<bool>& writes) {
  for (size_t i = 0; i < writes.size(); ++i) {
    Declaration buffer;
    if (FindDeclaration(wgsl, i, &buffer)) {
      wgsl.replace(buffer.access, buffer.access_size, writes[i] ? "read_write" : "read");
    }
  }
  return wgsl;
}

uint64_t WorkgroupBytes(const std::string& wgsl) {
  const std::string start = "var<workgroup> ";
  const std::string array = "array<";
  uint64_t bytes = 0;
  for (size_t at = wgsl.find(start); at != std::string::npos; at = wgsl.find(start, at + 1)) {
    const size_t end = wgsl.find(';', at);
    const size_t element = wgsl.find(array, at);
    const size_t comma = wgsl.rfind(',', end);
    if (end == std::string::npos || element > end || comma < element) continue;
    const std::string type =
        wgsl.substr(element + array.size(), comma - element - array.size());
    const uint64_t scalar = type.find("16") != std::string::npos ? 2 : 4;
    // A vector of three takes the place of one of four.
    const uint64_t lanes = type.compare(0, 3, "vec") != 0 ? 1 : type[3] == '2' ? 2 : 4;
    bytes += scalar * lanes * std::strtoull(wgsl.c_str() + comma + 1, nullptr, 10);
  }
  return bytes;
}

}  // namespace mlcawq
