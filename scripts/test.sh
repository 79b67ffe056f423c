#!/usr/bin/env bash
# Every check of the project, in stages. `make test` runs all of them; name stages to run only those:
#
#   scripts/test.sh                        all, daily dose
#   scripts/test.sh js conformance         these two
#   DOSE=long scripts/test.sh              the long dose (docs/testing.md)
#
# A failing stage does not stop the later ones; the exit status tells whether any failed. The last line is
# "N passed, N failed, N skipped", summed over all stages. Logs, reports and counts lie in build/test/.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.toolchain/node/bin:$PWD/node_modules/.bin:$PATH"

ALL_STAGES=(lint generated native asan tsan tidy js conformance scenarios demo)
OUT=$PWD/build/test
JOBS=${JOBS:-$(nproc)}
export DOSE=${DOSE:-daily}

stages=("$@")
[ "${#stages[@]}" -gt 0 ] || stages=("${ALL_STAGES[@]}")
for stage in "${stages[@]}"; do
  case " ${ALL_STAGES[*]} " in
    *" $stage "*) ;;
    *) echo "unknown stage: $stage (known: ${ALL_STAGES[*]})" >&2; exit 2 ;;
  esac
done
rm -rf "$OUT" && mkdir -p "$OUT"

# --- counting -------------------------------------------------------------------------------------------------------
# A stage that counts writes "passed failed skipped" to $OUT/<stage>.tally and one reason per line to <stage>.skips.

tally() { printf '%d %d %d\n' "$2" "$3" "$4" > "$OUT/$1.tally"; }

# Counts of a node:test run, from the TAP reporter's closing comments.
tally_tap() { # stage file
  awk -v skips="$OUT/$1.skips" '
    /^# pass /      { passed = $3 }
    /^# fail /      { failed += $3 }
    /^# cancelled / { failed += $3 }
    /^# skipped /   { skipped = $3 }
    /^# todo /      { skipped += $3 }
    / # (SKIP|TODO)/ { sub(/^ *(not )?ok [0-9]+ - /, ""); print > skips }
    END { printf "%d %d %d\n", passed, failed, skipped }' "$2" > "$OUT/$1.tally"
}

# Counts of a ctest run: the cases inside every GoogleTest binary, from their XML reports; any other test, and a binary
# that crashed before it wrote a report, counts as one.
tally_ctest() { # stage folder ctest-status
  local name outcome reports=() plain_passed=0 plain_failed=0
  while read -r name outcome; do
    if [ -e "$2/$name-test.xml" ] || [ -e "$2/$name.xml" ]; then continue; fi
    if [ "$outcome" = run ]; then plain_passed=$((plain_passed + 1)); else plain_failed=$((plain_failed + 1)); fi
  done < <(sed -n 's/.*<testcase name="\([^"]*\)".* status="\([a-z]*\)".*/\1 \2/p' "$2/ctest.junit")
  mapfile -t reports < <(find "$2" -name '*.xml')
  awk -v status="$3" -v passed="$plain_passed" -v failed="$plain_failed" -v skips="$OUT/$1.skips" '
    function attribute(name,   at) {
      if (!match($0, " " name "=\"[^\"]*\"")) return ""
      at = substr($0, RSTART, RLENGTH); sub(/^[^"]*"/, "", at); sub(/"$/, "", at); return at
    }
    /<testsuites /  { tests += attribute("tests"); broken += attribute("failures") + attribute("errors") }
    /<testcase /    { if (attribute("status") == "notrun" || attribute("result") == "skipped") {
                        skipped++; print attribute("classname") "." attribute("name") > skips } }
    END { passed += tests - broken - skipped; failed += broken
          if (status != 0 && failed == 0) failed = 1
          printf "%d %d %d\n", passed, failed, skipped }
  ' /dev/null "${reports[@]}" > "$OUT/$1.tally"
}

# --- stages ---------------------------------------------------------------------------------------------------------

stage_lint() {
  local failed=0
  biome check --error-on-warnings . || failed=$((failed + 1))
  tsc -p tsconfig.json --noEmit || failed=$((failed + 1))
  tally lint $((2 - failed)) "$failed" 0
  [ "$failed" = 0 ]
}

stage_generated() {
  local fresh; fresh=$(mktemp -d)
  local status=0
  buf generate -o "$fresh" && diff -r "$fresh/src/gen" src/gen || status=1
  rm -rf "$fresh"
  tally generated $((1 - status)) "$status" 0
  return "$status"
}

native_preset() { # stage preset
  local status=0
  (cd native && cmake --preset "$2" > /dev/null) && cmake --build "build/native-$2" -j "$JOBS" || return 1
  mkdir -p "$OUT/$1"
  GTEST_OUTPUT="xml:$OUT/$1/" ctest --test-dir "build/native-$2" --output-on-failure --output-junit "$OUT/$1/ctest.junit" \
    -j "$JOBS" || status=$?
  tally_ctest "$1" "$OUT/$1" "$status"
  return "$status"
}
stage_native() { native_preset native release; }
# The tests draw fewer random operations under a sanitizer, by themselves.
stage_asan() {
  ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1 native_preset asan asan
}
stage_tsan() { TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 native_preset tsan tsan; }

# Warnings are errors in every build; clang-tidy adds the checks of .clang-tidy on the sources of the product itself.
# Tests are left out: GoogleTest's macros cost most of the time and find nothing in our code.
stage_tidy() {
  local database=build/native-release failed=0 file
  [ -e "$database/compile_commands.json" ] || (cd native && cmake --preset release > /dev/null) || return 1
  local files; files=$(find native -name '*.cc' ! -name '*-test.cc' ! -path '*/testing/*' ! -path '*/bench/*' | sort)
  mkdir -p "$OUT/tidy"
  # shellcheck disable=SC2086
  printf '%s\n' $files | OUT="$OUT" DATABASE="$database" xargs -P "$JOBS" -I{} bash -c '
    report="$OUT/tidy/$(echo "{}" | tr / _)"
    clang-tidy --quiet -p "$DATABASE" "{}" > "$report" 2> "$report.err" && rm -f "$report" "$report.err"
    true'
  for file in "$OUT"/tidy/*; do
    case "$file" in
      *.err) ;;
      *) [ -e "$file" ] && failed=$((failed + 1)) && cat "$file" && tail -n 3 "$file.err" ;;
    esac
  done
  local total; total=$(echo "$files" | wc -l)
  tally tidy $((total - failed)) "$failed" 0
  [ "$failed" = 0 ]
}

node_tests() { # stage concurrency patterns…
  local stage=$1 concurrency=$2 status=0
  shift 2
  node --disable-warning=ExperimentalWarning --test --test-concurrency="$concurrency" \
    --test-reporter=spec --test-reporter-destination=stdout \
    --test-reporter=tap --test-reporter-destination="$OUT/$stage.tap" "$@" || status=1
  tally_tap "$stage" "$OUT/$stage.tap"
  return "$status"
}
stage_js() { node_tests js "$JOBS" 'src/**/*.test.ts' 'scripts/**/*.test.ts' 'e2e/harness/*.test.ts' 'e2e/images/*.test.ts' 'e2e/demo/*.test.ts' 'bench/**/*.test.ts'; }
stage_conformance() { node e2e/conformance/run.ts --tally "$OUT/conformance"; }
# One file at a time: several measure what is left on the whole machine.
stage_scenarios() { node_tests scenarios 1 'e2e/scenarios/*.test.ts'; }
stage_demo() {
  local status=0
  node e2e/demo/demo.ts < /dev/null | cat || status=1
  tally demo $((1 - status)) "$status" 0
  return "$status"
}

# --- run ------------------------------------------------------------------------------------------------------------

rows=(); passed=0; failed=0; skipped=0; broken=()
account() { # stage status seconds
  local p=0 f=0 s=0
  [ -s "$OUT/$1.tally" ] && read -r p f s < "$OUT/$1.tally"
  [ "$2" = 0 ] || [ "$f" -gt 0 ] || f=1
  passed=$((passed + p)); failed=$((failed + f)); skipped=$((skipped + s))
  rows+=("$(printf '%-12s %-6s %7d %7d %8d %8d' "$1" "$([ "$2" = 0 ] && [ "$f" = 0 ] && echo ok || echo FAILED)" "$p" "$f" "$s" "$3")")
  { [ "$2" = 0 ] && [ "$f" = 0 ]; } || broken+=("$1")
}

began=$SECONDS
node e2e/harness/leaks.ts save "$OUT/machine.json" || { echo 'cannot record the state of the machine' >&2; exit 1; }
for stage in "${stages[@]}"; do
  printf '\n=== %s\n' "$stage"
  start=$SECONDS
  "stage_$stage" > "$OUT/$stage.log" 2>&1
  status=$?
  account "$stage" "$status" $((SECONDS - start))
  if [ "$status" = 0 ]; then
    printf 'ok, %d s (build/test/%s.log)\n' $((SECONDS - start)) "$stage"
    [ "$stage" != conformance ] || sed -n '/^mode /,$p' "$OUT/$stage.log"
  else
    printf 'FAILED after %d s; the end of build/test/%s.log:\n' $((SECONDS - start)) "$stage"
    tail -n 150 "$OUT/$stage.log"
  fi
done

printf '\n=== leaks\n'
start=$SECONDS
if node e2e/harness/leaks.ts check "$OUT/machine.json" 2>&1 | tee "$OUT/leaks.log"; then
  status=0; tally leaks 1 0 0
else
  status=1; tally leaks 0 1 0
fi
account leaks "$status" $((SECONDS - start))

printf '\n%-12s %-6s %7s %7s %8s %8s\n' stage result passed failed skipped seconds
printf '%s\n' "${rows[@]}"
printf '%-12s %-6s %7s %7s %8s %8d\n' total '' '' '' '' $((SECONDS - began))
if compgen -G "$OUT/*.skips" > /dev/null; then
  printf '\nskipped, and why:\n'
  sort -u "$OUT"/*.skips | sed 's/^/  /'
fi
[ "${#broken[@]}" = 0 ] || printf '\nfailed stages: %s\n' "${broken[*]}"
printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" = 0 ]
