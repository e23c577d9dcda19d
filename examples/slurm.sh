#!/usr/bin/env bash
# Train on two machines with four GPUs each under Slurm:
#
#     sbatch examples/slurm.sh /shared/photos /shared/runs/a
#
# The data, the run folder and the environment lie on a file system that all machines see. Slurm sends SIGUSR1 two minutes
# before the time is over; the training saves and ends with exit code 138, and the job puts itself into the queue again.
# The same command then goes on from the last checkpoint, as it does when a machine fails and Slurm requeues the job.
#SBATCH --job-name=refinedet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

data=${1:?usage: sbatch examples/slurm.sh DATA RUN}
run=${2:?usage: sbatch examples/slurm.sh DATA RUN}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# bash runs a trap only when the command that it waits for has ended, so the training runs in the background.
trap 'scancel --signal=USR1 "$SLURM_JOB_ID.0"; wait "$training" || true; scontrol requeue "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 4 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:29500" \
    -m refinedet train --data "$data" --out "$run" &
training=$!
wait "$training"
