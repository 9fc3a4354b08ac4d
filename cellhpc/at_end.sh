task=$(printf '%s/%s-%04d' "$submission" "$stage" $((first + ${SLURM_ARRAY_TASK_ID:-0})))
attempt="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
me="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
me="${me:-$SLURM_JOB_ID}"  # one element's own number is that of the whole array
how=setup
job=
remove_scratch() { :; }
told() { local rest=" $job "; case "$rest" in *" $1="*) rest=${rest#*" $1="}; echo "${rest%% *}" ;; esac; }
seconds() {  # of [D-]HH:MM:SS
    local days=0 clock=$1 hours minutes rest
    case "$clock" in *-*) days=${clock%%-*}; clock=${clock#*-} ;; esac
    IFS=: read -r hours minutes rest <<< "$clock"
    echo $((86400 * days + 3600 * 10#$hours + 60 * 10#$minutes + 10#$rest))
}
ended_by_slurm() {  # cancelled, or queued again by Slurm itself; not at the time limit, and not preempted
    case "$(told JobState)" in '' | RUNNING) return 1 ;; esac
    case "$(told PreemptTime)" in '' | None) ;; *) return 1 ;; esac
    case "$(told TimeLimit)" in *:*:*) [ "$(seconds "$(told RunTime)")" -lt "$(seconds "$(told TimeLimit)")" ] ;; esac
}
at_end() {
    code=$?
    for mark in again checkpointed done; do [ -e "$task/$attempt/$mark" ] && how=$mark; done
    if [ "$how" != done ] && command -v scontrol > /dev/null; then
        # A controller that is down is waited for, ten minutes at most.
        for try in $(seq 60); do job=$(scontrol show job -o "$me") && break; sleep 10; done
    fi
    again=yes
    case "$how" in
        done) code=$(cat "$task/$attempt/done"); again=no ;;
        setup) again=no ;;
        *) if [ -e "$submission/cancelled" ]; then how=cancelled again=no
           elif ended_by_slurm; then again=no; [ "$how" != crashed ] || how=cancelled; fi ;;
    esac
    echo "$(date +%s) $(hostname) $attempt $code $how" >> "$task/ends" || exit $code  # a full disk
    [ -n "$job" ] || again=no
    [ "$how" != crashed ] || [ "$(grep -c ' crashed$' "$task/ends")" -le "$restarts" ] || again=no
    remove_scratch
    # Only if Slurm has not started the task elsewhere by now, as it does when it loses sight of a node.
    [ $again = no ] || [ "$(told Restarts)" != "${SLURM_RESTART_COUNT:-0}" ] || scontrol requeue "$me" || again=no
    [ "$how" != checkpointed ] || [ $again = yes ] || exit 75  # what waits for it must not begin
    exit $code
}
trap : TERM  # the ranks end first
trap at_end EXIT
mkdir -p "$task" && mkdir -p -m 700 "$task/$attempt" || exit 1  # keys of the moment lie there
rm -f "$task/failed.json"
