#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# Proof that the tests can fail: apply each mutation of mutations.txt to a copy of
# the core, build and run. A mutant that passes is a hole in the tests.
#
#   CC=... CPPFLAGS=... CFLAGS=... mutate.sh BUILD KMOD
#
# BUILD holds the objects of the unbroken core and of the tests; a mutant of a .c
# file costs one compilation and a link.
set -eu

build=$(cd "$1" && pwd)
kmod=$(cd "$2" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
work=$build/mutation

# Short rounds; a test that runs away is stopped. Appends to ./log.
quick()
{
	test=$1
	shift
	(unset SEED; TIMEOUT=20 STEPS=600 exec "$test" -x "$@") >>log 2>&1
}

# In mutant $1, a directory: write killed, SURVIVED, STALE or INVALID to result.
try()
{
	cd "$1"
	file=$(cat file)
	mkdir -p core
	cp "$kmod"/core/*.[ch] core/
	if ! sed -i -f expression "core/$file" >log 2>&1; then
		echo INVALID >result
		return
	fi
	if cmp -s "$kmod/core/$file" "core/$file"; then
		echo STALE >result
		return
	fi
	objects=$(ls "$build"/checked/core/*.o "$build"/checked/*.o)
	case $file in
	*.c)
		sources=core/$file
		objects=$(echo "$objects" |
			  grep -v "/checked/core/${file%.c}\.o\$")
		;;
	*)
		sources="$(ls core/*.c) $(ls "$here"/*.c)"
		objects=
		;;
	esac
	# The copy comes first in the search path; warnings are no defect here.
	# shellcheck disable=SC2086
	if ! $CC -I. -I"$here" $CFLAGS -Wno-error -w -o test \
			$sources $objects >log 2>&1; then
		echo INVALID >result
		return
	fi
	# The tests of that file first, which find most: then all.
	first=${file%.[ch]}
	case $first in
	buddy)
		# Nothing but compaction drains.
		first="buddy compact"
		;;
	heap)
		# An arena is where compaction and odd orders of calls come from.
		first="heap rt_"
		;;
	rt)
		# Not each name that has these two letters.
		first="rt_"
		;;
	esac
	# shellcheck disable=SC2086
	if quick ./test $first && quick ./test; then
		echo SURVIVED >result
	else
		echo killed >result
	fi
	rm -f test
}

if [ "${3-}" ]; then
	try "$3"
	exit
fi

rm -rf "$work"
mkdir -p "$work"
cd "$work"
# A kill proves nothing if the unbroken core fails too.
if ! quick "$build/core_test"; then
	cat log
	echo "the tests fail without a mutation"
	exit 1
fi
n=0
while IFS= read -r file; do
	case $file in
	'#'*|'')
		continue
		;;
	esac
	IFS= read -r expression
	IFS= read -r what
	n=$((n + 1))
	dir=$work/$(printf %03d $n)
	mkdir "$dir"
	# Not echo, which may take a backslash for its own.
	printf '%s\n' "$file" >"$dir/file"
	printf '%s\n' "$expression" >"$dir/expression"
	printf '%s\n' "$what" >"$dir/what"
done <"$here/mutations.txt"

ls -d "$work"/[0-9]* |
	xargs -P "$(nproc)" -I{} sh "$here/mutate.sh" "$build" "$kmod" {}

killed=0
for dir in "$work"/[0-9]*; do
	result=$(cat "$dir/result")
	by=$(sed -n 's/^FAIL //p' "$dir/log" 2>/dev/null | sed 's/ .*//' |
	     head -n 1)
	if grep -q 'took longer than' "$dir/log" 2>/dev/null; then
		by="$by, never ended"
	fi
	printf '%-8s %-10s %s%s\n' "$result" "$(cat "$dir/file")" \
		"$(cat "$dir/what")" "${by:+ [$by]}"
	[ "$result" != killed ] || killed=$((killed + 1))
done
echo "$killed of $n mutants killed"
[ "$killed" -eq "$n" ]
