#!/usr/bin/env bash
# Judge an engine and say what broke: the steps of the action beside this file, which run anywhere.
#
#   ENGINE    package.module:factory or path/file.py:factory
#   KNOWN     file of known failures, "" for none
#   WORKERS   processes that judge
#   OPTIONS   more options of pytest, such as: --tier default
#   REPORTS   folder of the runs and of badge.json
#
# Exit code: 0 where nothing broke, 1 where something did, 2 where the engine could not be judged.
# Without GitHub's variables, the summary and the output go to files in REPORTS.
set -uo pipefail
: "${ENGINE:?name the engine: ENGINE=package.module:factory}"
REPORTS=${REPORTS:-reports}
mkdir -p "$REPORTS"
summary=${GITHUB_STEP_SUMMARY:-$REPORTS/summary.md} output=${GITHUB_OUTPUT:-$REPORTS/output.txt}
run=$(realpath "$REPORTS")/runs/$(date -u +%Y%m%dT%H%M%SZ)-$$

# shellcheck disable=SC2086 # OPTIONS are several words
pytest --pyargs ktverify.suites -n "${WORKERS:-2}" --engine "$ENGINE" --run-dir "$run" ${OPTIONS:-}
ktverify gate "$run" --reports "$REPORTS" ${KNOWN:+--known-failures "$KNOWN"} >"$REPORTS/gate.txt" 2>&1
code=$?
cat "$REPORTS/gate.txt"

verdict=$(head -n 1 "$REPORTS/gate.txt")
case $code in 0) word=passing colour=brightgreen ;; 1) word=failing colour=red ;; *) word=unknown colour=lightgrey ;; esac
# the form of https://shields.io/badges/endpoint-badge
printf '{"schemaVersion": 1, "label": "ktverify", "message": "%s", "color": "%s"}\n' "$word" "$colour" \
    >"$REPORTS/badge.json"
{
    printf '## ktverify: %s\n\n' "$ENGINE"
    printf '```\n'
    head -n 60 "$REPORTS/gate.txt"
    printf '```\n\n'
    [ -f "$run/accuracy.md" ] && head -c 500000 "$run/accuracy.md"
} >>"$summary"
{
    printf 'verdict=%s\n' "$verdict"
    printf 'passed=%s\n' "$([ $code -eq 0 ] && echo true || echo false)"
    printf 'run=%s\n' "$run"
} >>"$output"
exit $code
