# Sourced by the other scripts: goes to the project's root and says which virtual environment is used.
#
# Sets:
#   root    the project's root folder, which is the working directory from here on
#   venv    the active virtual environment, if there is one; else .venv in the project's root

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
venv="${VIRTUAL_ENV:-$root/.venv}"

# Print the comment at the top of the calling script, which is its manual.
show_help() {
    sed -n '2,/^$/{/^#/s/^# \{0,1\}//p}' "$0"
}

# Say what went wrong and how to mend it, then end.
fail() {
    printf '%s: %s\n' "$(basename "$0")" "$1" >&2
    exit 1
}
