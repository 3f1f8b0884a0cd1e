#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# Line and branch coverage of the core after a run, and what was not reached.
#
#   GCOV=... coverage.sh OBJECTS
set -eu

# Paths in the reports are those the objects were compiled with: run in the same
# directory. The reports of all sources come in one stream.
printf '%-12s %18s %18s\n' file lines branches
${GCOV:-gcov} -b -c -t "$1"/*.gcda | awk '
function part(n, of) {
	return sprintf("%d/%d %6.2f %%", n, of, of ? 100 * n / of : 100)
}
function report(l) {
	if (!wanted)
		return
	printf "%-12s %18s %18s\n", name, part(run, lines),
		part(taken, branches)
	for (l = 1; l <= line; l++) {
		if (l in unrun)
			printf "  %d not run: %s\n", l, text[l]
		else if (l in missed)
			printf "  %d branch%s not taken: %s\n", l, missed[l],
				text[l]
	}
	all_run += run
	all_lines += lines
	all_taken += taken
	all_branches += branches
}
/^ *-: *0:Source:/ {
	report()
	wanted = /\/core\//
	name = $0
	sub(/.*\//, "", name)
	run = lines = taken = branches = line = 0
	split("", unrun)
	split("", missed)
	split("", text)
	next
}
/^branch/ {
	branches++
	if ($3 != "never" && $4 > 0)
		taken++
	else
		missed[line] = missed[line] " " $2
	next
}
/^(call|function|unconditional)/ { next }
/^ *[-#=0-9*]+: *[0-9]+:/ {
	split($0, f, ":")
	gsub(/ /, "", f[1])
	line = f[2] + 0
	text[line] = substr($0, length(f[2]) + index($0, ":") + 2)
	gsub(/^[ \t]+/, "", text[line])
	if (f[1] == "-")
		next
	lines++
	if (f[1] ~ /^[#=]/)
		unrun[line] = 1
	else
		run++
}
END {
	report()
	printf "%-12s %18s %18s\n", "total", part(all_run, all_lines),
		part(all_taken, all_branches)
	exit !all_lines
}'
