#!/usr/bin/env bash
# Runs beside Ray on a GPU node. When the cloud announces that it takes a spot node back (EC2 two minutes before, Google
# half a minute), the node is drained: Serve starts its replicas elsewhere and moves the requests, while there is time.
set -u
metadata=${METADATA_URL:-http://169.254.169.254}  # both clouds have it there
exec 9>"${TMPDIR:-/tmp}/spot_watch.lock"
flock -n 9 || exit 0  # one is enough

ec2_takes_it() {
    local token
    token=$(curl -sf -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/latest/api/token") || return
    curl -sf -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/spot/instance-action"
}

google_takes_it() {
    local preempted
    preempted=$(curl -sf -m 2 -H 'Metadata-Flavor: Google' "$metadata/computeMetadata/v1/instance/preempted")
    [ "$preempted" = TRUE ]
}

# Told by this node's own raylet; what `ray drain-node` would guess could be another node on a machine with several.
node_id() {
    pgrep -af '/raylet/raylet ' | grep -oE 'node_id=[0-9a-f]+' | head -n 1 | cut -d = -f 2
}

while true; do
    seconds_left=0
    if ec2_takes_it; then seconds_left=110; elif google_takes_it; then seconds_left=25; fi
    if [ "$seconds_left" -gt 0 ]; then
        ray drain-node --node-id "$(node_id)" --reason DRAIN_NODE_REASON_PREEMPTION \
            --reason-message 'spot node is taken back' --deadline-remaining-seconds "$seconds_left" && exit 0
    fi
    sleep "${POLL_S:-5}"
done
