task=$(printf '%s/%s-%04d' "$submission" "$stage" $((first + ${SLURM_ARRAY_TASK_ID:-0})))
attempt="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
me="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
me="${me:-$SLURM_JOB_ID}"  # one element's own number is that of the whole array
how=setup
at_end() {
    code=$?
    if [ -e "$task/$attempt/done" ]; then how=done; code=$(cat "$task/$attempt/done")
    elif [ -e "$task/$attempt/checkpointed" ]; then how=checkpointed; fi
    if [ "$how" != done ] && command -v scontrol > /dev/null; then
        # A controller that is down is waited for, ten minutes at most.
        for try in $(seq 60); do job=$(scontrol show job -o "$me") && break; sleep 10; done
        case "$job" in *JobState=CANCELLED*) how=cancelled ;; esac
    fi
    echo "$(date +%s) $(hostname) $attempt $code $how" >> "$task/ends"
    case "$how" in
        checkpointed) ;;
        crashed) [ "$(grep -c ' crashed$' "$task/ends")" -le "$restarts" ] || exit $code ;;
        *) exit $code ;;
    esac
    # Only if Slurm has not started the task elsewhere by now, as it does when it loses sight of a node.
    case "$job " in *" Restarts=${SLURM_RESTART_COUNT:-0} "*) scontrol requeue "$me" ;; esac
    exit $code
}
trap : TERM  # the ranks end first
trap at_end EXIT
mkdir -p "$task" && mkdir -p -m 700 "$task/$attempt" || exit 1  # keys of the moment lie there
