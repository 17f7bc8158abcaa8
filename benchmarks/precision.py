"""What half precision does to the scorecard: the demo's reward model on embeddings stored as float16, or encoded in bf16.

    python -m benchmarks.precision

Encodes the dataset three times, scores the test episodes with the model of stage 03, and leaves every metric of the scorecard
(over all test episodes) and its difference to float32 in benchmarks/precision.json. Needs the outputs of stages 00 to 03.
"""

import tempfile
from pathlib import Path

import pandas as pd

from sarm_lib import artifacts, checkpoint, dataset, encoder, lerobot_io, params, progress, scorecard

RESULTS = Path(__file__).with_suffix(".json")
VARIANTS = {
    "float32": {},
    "store_float16": {"prepare.store_dtype": "float16"},
    "encode_bf16": {"prepare.precision": "bf16"},
    "encode_and_score_bf16": {"prepare.precision": "bf16", "rabc.precision": "bf16"},
}


def main() -> None:
    base = params.load("params.yaml")
    device = dataset.pick_device(base.base.device)
    demos = dataset.from_params(base)
    labels = lerobot_io.read_labels(base.paths.read("dataset/meta", "02_verify").parent, demos, base.heads)
    model = checkpoint.load_reward_model(base.paths.read("sarm", "03_train_sarm"), device)
    test = scorecard.test_episodes(demos, labels)
    references, figures = scorecard.references(demos, labels, test, base.base.truth_prefix), {}
    for name, overrides in VARIANTS.items():
        with tempfile.TemporaryDirectory() as temporary:
            config = params.load("params.yaml", {**overrides, "base.outputs": temporary})
            folder = config.paths.write("embeddings")
            encoder.ensure_embeddings(folder, config, demos, encoder.from_params(config, device))
            store = progress.frame_store(demos, encoder.open_embeddings(folder, demos), model)
            heads, precision = model.spec.heads, config.rabc.precision
            scores = progress.score_episodes(model.sarm, store, test, heads, precision=precision)
            predicted = [scorecard.Predicted({head: scores[e.index, head] for head in heads}) for e in test]
        figures[name] = scorecard.card(references, predicted)["all"]
    metrics = [metric for metric in scorecard.METRICS if metric in figures["float32"]]
    table = pd.DataFrame({name: {m: of[m] for m in metrics} for name, of in figures.items()})
    difference = table.drop(columns="float32").sub(table["float32"], axis=0)
    found = {"figures": table.to_dict(), "difference_to_float32": difference.round(6).to_dict()}
    artifacts.write_json(RESULTS, {"checkpoint": model.checkpoint, **found})
    print(table.round(4).to_string(), "\n\ndifference to float32\n", difference.round(5).to_string())


if __name__ == "__main__":
    main()
