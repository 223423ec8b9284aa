#!/usr/bin/env bash
# Two hosts on one machine: network namespaces joined by a veth pair, torchrun on each, gloo between them.
# usage, as root, with iproute2 installed:     tests/two_hosts.sh train.py config/train_shakespeare_char_cpu.py --device=cpu
# PROCS is the number of processes a host (1), TORCHRUN another torchrun. Exits with 77 where namespaces are not allowed.
set -u
a=exa$$ b=exb$$
clean() { ip netns del "$a" 2>/dev/null; ip netns del "$b" 2>/dev/null; }
trap clean EXIT
ip netns add "$a" && ip netns add "$b" && ip link add va$$ type veth peer name vb$$ || exit 77   # 77: not allowed here
ip link set va$$ netns "$a"; ip link set vb$$ netns "$b"
ip -n "$a" addr add 10.77.0.1/24 dev va$$; ip -n "$b" addr add 10.77.0.2/24 dev vb$$
for n in "$a" "$b"; do ip -n "$n" link set lo up; done
ip -n "$a" link set va$$ up; ip -n "$b" link set vb$$ up
export OMP_NUM_THREADS=1
run() { # namespace, interface, node rank
  GLOO_SOCKET_IFNAME=$2 ip netns exec "$1" "${TORCHRUN:-torchrun}" --nnodes=2 --node_rank="$3" --nproc_per_node="${PROCS:-1}" \
    --master_addr=10.77.0.1 --master_port=29511 "${@:4}"
}
run "$a" va$$ 0 "$@" & first=$!
run "$b" vb$$ 1 "$@"; second=$?
wait $first && exit $second
