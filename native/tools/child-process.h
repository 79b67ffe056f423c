// Runs a program and waits for it.
#pragma once

#include <string>
#include <vector>

#include "base/status.h"

namespace obd {

// argv[0] is looked up in PATH. Stdin is empty; what the program says on stdout and stderr ends up in the message of a
// failure (its last 4 KiB). unavailable if it cannot be started, failedPrecondition if it exits with a code not in
// `good`. Signals that end this process do not end the program: it is short.
Status runProgram(const std::vector<std::string>& argv, const std::vector<int>& good = {0});

}  // namespace obd
