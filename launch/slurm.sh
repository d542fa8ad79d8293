#!/bin/bash
# Trains on two nodes: sbatch slurm.sh. README.md says what to change.
#SBATCH --job-name=tfclm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the time is up, the tasks are told to end, and the run saves its state.
#SBATCH --signal=TERM@120

# Slurm tells each task where the others are: no TF_CONFIG.
srun --kill-on-bad-exit=0 python -m tfclm.fit --strategy multi_worker --model distilgpt2 \
  --train-file "$HOME/texts/*.jsonl" --output-dir "$HOME/runs/mine"
code=$?
# 2 means that a setting is wrong, 1 that the run was interrupted: then the job is queued again, and goes on.
if [ "$code" -eq 1 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
