#!/usr/bin/env bash
# Runs a script on two hosts of one machine: two network namespaces joined by a cable (a veth pair),
# torchrun in each, gloo between them. Needs root and iproute2; exits with 77 where the kernel
# allows no namespaces. PROCS: processes per host (1). TORCHRUN: the torchrun to use.
#
#   tests/two_hosts.sh train.py config/train_shakespeare_char_cpu.py --device=cpu
set -u

host_a=hostA$$
host_b=hostB$$
cable_a=vethA$$
cable_b=vethB$$
remove_hosts() {
  ip netns del "$host_a"
  ip netns del "$host_b"
} 2>/dev/null
trap remove_hosts EXIT

ip netns add "$host_a" || exit 77
ip netns add "$host_b" || exit 77
ip link add "$cable_a" type veth peer name "$cable_b" || exit 77

connect() {  # host, end of the cable, address
  ip link set "$2" netns "$1"
  ip -n "$1" addr add "$3/24" dev "$2"
  ip -n "$1" link set lo up
  ip -n "$1" link set "$2" up
}
connect "$host_a" "$cable_a" 10.77.0.1
connect "$host_b" "$cable_b" 10.77.0.2

export OMP_NUM_THREADS=1
run() {  # host, end of the cable, node rank, script and arguments
  GLOO_SOCKET_IFNAME=$2 ip netns exec "$1" "${TORCHRUN:-torchrun}" \
    --nnodes=2 --node_rank="$3" --nproc_per_node="${PROCS:-1}" \
    --master_addr=10.77.0.1 --master_port=29511 "${@:4}"
}
run "$host_a" "$cable_a" 0 "$@" &
first=$!
run "$host_b" "$cable_b" 1 "$@"
second_code=$?
wait "$first" && exit "$second_code"
