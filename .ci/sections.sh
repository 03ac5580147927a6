# For `.ci/run`: names its sections as they start and lists their seconds when it ends, however it ends.

section_names=()
section_starts=()

section() {
    printf '\n==== %s (after %d s)\n' "$*" "$SECONDS"
    section_names+=("$*")
    section_starts+=("$SECONDS")
}

# table STATUS: the last section is the one that failed, if STATUS is not 0.
table() {
    local i end
    section_starts+=("$SECONDS")
    printf '\n%7s  %s\n' seconds section
    for i in "${!section_names[@]}"; do
        end=${section_starts[i + 1]}
        printf '%7d  %s\n' "$((end - section_starts[i]))" "${section_names[i]}"
    done
    if [[ $1 == 0 ]]; then
        printf '%7d  all passed\n' "$SECONDS"
    else
        printf '%7d  FAILED in "%s"\n' "$SECONDS" "${section_names[-1]}"
    fi
}
trap 'table $?' EXIT
