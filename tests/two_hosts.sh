#!/usr/bin/env bash
# Runs a script on two hosts of one machine: two network namespaces joined by a cable (a veth pair),
# torchrun in each, gloo between them. Needs root and iproute2; exits with 77 where the kernel
# allows no namespaces. PROCS: processes per host (1). TORCHRUN: the torchrun to use.
#
#   tests/two_hosts.sh train.py config/train_shakespeare_char_cpu.py --device=cpu
set -u

hosts=(hostA$$ hostB$$)
cables=(vethA$$ vethB$$)
trap 'for host in "${hosts[@]}"; do ip netns del "$host"; done 2> /dev/null' EXIT

ip netns add "${hosts[0]}" && ip netns add "${hosts[1]}" &&
  ip link add "${cables[0]}" type veth peer name "${cables[1]}" || exit 77
for i in 0 1; do
  ip link set "${cables[i]}" netns "${hosts[i]}"
  ip -n "${hosts[i]}" addr add "10.77.0.$((i + 1))/24" dev "${cables[i]}"
  ip -n "${hosts[i]}" link set lo up
  ip -n "${hosts[i]}" link set "${cables[i]}" up
done

export OMP_NUM_THREADS=1
run() {  # node rank, script and arguments
  GLOO_SOCKET_IFNAME=${cables[$1]} ip netns exec "${hosts[$1]}" "${TORCHRUN:-torchrun}" \
    --nnodes=2 --node_rank="$1" --nproc_per_node="${PROCS:-1}" \
    --master_addr=10.77.0.1 --master_port=29511 "${@:2}"
}
run 0 "$@" &
first=$!
run 1 "$@"
second_code=$?
wait "$first" && exit "$second_code"
