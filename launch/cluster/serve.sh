#!/bin/sh
# Runs a server as the container of a Kubernetes Job:
#
#     launch/cluster/serve.sh python3 -m launch.serve_rollouts --engine=vllm ...
#
# A server that a drained node or a probe has stopped ends with status 0, which a Job takes for "done": it would never
# start it again. So signals are passed on, the drain is waited for, and every end is a failure.

"$@" &
server=$!
trap 'kill -TERM "$server"' TERM INT
while kill -0 "$server" 2>/dev/null; do
    wait "$server" # returns early when a signal comes
done
echo "the server has ended: $*" >&2
exit 1
