"""The command line. Imports nothing heavy, so that --help and typing mistakes are answered at once."""

from __future__ import annotations

from apps.common.arguments import Parser, count, number
from apps.common.finetune import arguments as shared

EXAMPLES = """examples:
  dense   accelerate launch apps/qa/train_prune.py --dataset_name squad \\
              --model_name_or_path bert-base-uncased --output_dir runs/squad/dense
  prune   accelerate launch apps/qa/train_prune.py --dataset_name squad \\
              --model_name_or_path runs/squad/dense --output_dir runs/squad/sparse --do_prune --dist_loss kl
  files   ... --train_file train-v2.0.json --validation_file dev-v2.0.json --version_2_with_negative
  resume  ... --resume_from_checkpoint runs/squad/sparse/step_500
  2 ranks accelerate launch --multi_gpu --num_processes 2 ...; on the CPU
          ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 ...
without data and model it trains a tiny BERT on made-up stories: about two minutes
"""


def parser() -> Parser:
    """Every option once."""
    made = Parser(description="Train, prune and distil a Transformers model that finds answers.", epilog=EXAMPLES)
    predictions = "predictions.json holds the answers to --validation_file; leave it out"
    made.gone = {**shared.GONE, "--do_predict": predictions, "--test_file": predictions}
    shared.add_model(made)
    data = made.add_argument_group("data")
    data.add_argument("--dataset_name", help="of the hub: squad, squad_v2, ...")
    data.add_argument("--dataset_config_name", help="its configuration, where it has several")
    data.add_argument(
        "--train_file", help="SQuAD's json, or rows (json, jsonl, parquet) of id, question, context, answers"
    )
    data.add_argument("--validation_file", help="the same")
    data.add_argument(
        "--version_2_with_negative", action="store_true", help="some questions have no answer (SQuAD 2.0)"
    )
    data.add_argument(
        "--max_seq_length", type=count(8), default=384, help="tokens of a window, question included (384)"
    )
    data.add_argument("--doc_stride", type=count(0), default=128, help="tokens that two windows share (128)")
    shared.add_rows(data)
    answers = made.add_argument_group("answers")
    answers.add_argument("--n_best_size", type=count(1), default=20, help="spans kept of each question (20)")
    answers.add_argument("--max_answer_length", type=count(1), default=30, help="tokens (30)")
    answers.add_argument(
        "--null_score_diff_threshold", type=number, default=0.0, help="how much better no answer must be (0)"
    )
    shared.add_pruning(made)
    shared.add_training(made)
    shared.add_output(made, "qa")
    return made
