#include "tools/child-process.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "base/assert.h"
#include "base/own-fd.h"

extern char** environ;

namespace obd {

Status runProgram(const std::vector<std::string>& argv, const std::vector<int>& good) {
  OBD_ASSERT(!argv.empty(), "a program needs a name");
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) return fromErrno("pipe", errno);
  OwnFd output(ends[0]);
  OwnFd input(ends[1]);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, input.get(), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, input.get(), STDERR_FILENO);
  std::vector<char*> pointers;
  pointers.reserve(argv.size() + 1);
  for (const std::string& word : argv) pointers.push_back(const_cast<char*>(word.c_str()));
  pointers.push_back(nullptr);
  pid_t pid = -1;
  const int failure = ::posix_spawnp(&pid, pointers[0], &actions, nullptr, pointers.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (failure != 0) return unavailable(fromErrno(argv[0], failure).message());
  input.reset();

  std::string said;
  std::array<char, 4096> buffer{};
  while (true) {
    const ssize_t got = ::read(output.get(), buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    said.append(buffer.data(), static_cast<size_t>(got));
    if (said.size() > 2 * buffer.size()) said.erase(0, said.size() - buffer.size());
  }
  int state = 0;
  while (::waitpid(pid, &state, 0) < 0 && errno == EINTR) {
  }
  if (WIFEXITED(state) && std::ranges::find(good, WEXITSTATUS(state)) != good.end()) return Status::ok();
  while (!said.empty() && said.back() == '\n') said.pop_back();
  const std::string how = WIFEXITED(state) ? "exited with " + std::to_string(WEXITSTATUS(state))
                                           : "ended by signal " + std::to_string(WTERMSIG(state));
  return failedPrecondition(argv[0] + " " + how + (said.empty() ? "" : ": " + said));
}

}  // namespace obd
