#!/bin/sh
# keep_ptxas.sh COMPILER ARGUMENTS... -o FILE: runs the compiler, and keeps what ptxas says of each kernel (registers,
# spills) in FILE.ptxas instead of printing it. scripts/ptxas-table.mjs reads it.
file=/dev/null previous=
for argument; do
  if [ "$previous" = -o ]; then file=$argument; fi
  previous=$argument
done
said=$(mktemp) || exit
trap 'rm -f "$said"' EXIT
"$@" 2>"$said"
status=$?
of_ptxas='^ptxas info|^ +[0-9]+ bytes stack frame'
grep -Ev "$of_ptxas" "$said" >&2
if [ "$status" -eq 0 ] && [ "$file" != /dev/null ]; then grep -E "$of_ptxas" "$said" >"$file.ptxas"; fi
exit "$status"
