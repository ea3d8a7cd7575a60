#!/bin/bash
# Training on many machines under SLURM: sbatch examples/slurm.sh --dataset DATA --shards 32
# Started in the folder of train.py, which all machines see, as they see the data and --out_dir.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
# --no-kill: the machines that are left go on when one is lost.
# --requeue: a job that is preempted, or loses its first machine, starts again and goes on with its run.
# --signal: two minutes before the end of its time a job saves, and says how to go on.

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else no machine can join later (docs/torchrun.md)
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --no-kill --kill-on-bad-exit=0 torchrun \
    --nnodes "1:$SLURM_NNODES" \
    --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
    --max-restarts 10 \
    --rdzv_backend c10d \
    --rdzv_endpoint "$first:29500" \
    --rdzv_id "$SLURM_JOB_ID" \
    train.py --name "job-$SLURM_JOB_ID" "$@"
