#!/bin/sh
# An agent that is a shell script. It is started once for each attempt, with what it needs in its environment:
#
#   AGL_TASK          the input of the rollout, as JSON: here {"path": "...", "words": 3}
#   AGL_ROLLOUT_ID, AGL_ATTEMPT_ID
#   OPENAI_BASE_URL   a model, if the resources name one; whatever is asked there is recorded for this attempt
#
# The last line that it prints is the reward. Any exit code but 0 fails the attempt.

set -eu

field() { printf '%s' "$AGL_TASK" | sed -n "s/.*\"$1\": *\"\{0,1\}\([^\",}]*\).*/\1/p"; }

file="$(field path)"
expected="$(field words)"
counted="$(wc -w <"$file" | tr -d ' ')"

echo "$AGL_ROLLOUT_ID: $file has $counted words, $expected were expected"
if [ "$counted" -eq "$expected" ]; then echo 1; else echo 0; fi
