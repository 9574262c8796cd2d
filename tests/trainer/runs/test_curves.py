"""The picture of a log shows what was logged, and nothing else."""

import matplotlib.pyplot as plt
import pytest
from tdpo import plot_log
from tdpo.runs.log_history import evaluation_prefix

from helpers.log_histories import evaluation, training

MADE_UP = [
    training(10, loss=0.69, margin=0.0, accuracy=0.5, kl=(0.1, 0.2)),
    {"my_loss": 3.0, "step": 10},  # logged by hand
    evaluation(10, loss=0.68, margin=0.1, accuracy=0.6, kl=(0.3, 0.4)),
    training(20, loss=0.60, margin=1.0, accuracy=0.8, kl=(1.0, 2.0)),
    evaluation(20, loss=0.66, margin=0.2, accuracy=0.7, kl=(1.1, 2.2)),
    {"train_loss": 0.65, "train_runtime": 1.0, "step": 20},
]


def lines(axes):
    """The curves of a panel, by their labels."""
    return {line.get_label(): [list(map(float, values)) for values in line.get_data()] for line in axes.lines}


def test_every_curve_is_drawn():
    panels = {axes.get_title(): lines(axes) for axes in plot_log(MADE_UP).axes}
    steps = [10.0, 20.0]
    assert panels == {
        "loss": {"training": [steps, [0.69, 0.60]], "eval": [steps, [0.68, 0.66]]},
        "accuracy": {"training": [steps, [0.5, 0.8]], "eval": [steps, [0.6, 0.7]]},
        "margin": {"training": [steps, [0.0, 1.0]], "eval": [steps, [0.1, 0.2]]},
        "KL, nats": {
            "chosen": [steps, [0.1, 1.0]],
            "rejected": [steps, [0.2, 2.0]],
            "chosen eval": [steps, [0.3, 1.1]],
            "rejected eval": [steps, [0.4, 2.2]],
        },
    }


def test_several_evaluation_sets_look_different():
    sets = {"eval_short_": 0.7, "eval_long_": 0.8}
    history = [evaluation(5, prefix=prefix, loss=loss) for prefix, loss in sets.items()]
    axes = plot_log(history).axes[0]
    assert lines(axes) == {"eval_short": [[5.0], [0.7]], "eval_long": [[5.0], [0.8]]}
    assert len({line.get_marker() for line in axes.lines}) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["eval_short", "eval_long"]


def test_a_log_without_a_reference_has_no_kl():
    figure = plot_log([training(1, kl=None), training(2, kl=None)])
    assert [axes.get_title() for axes in figure.axes] == ["loss", "accuracy", "margin"]
    assert figure.axes[0].get_legend() is None  # of one line


def test_a_figure_of_the_users_own_is_drawn_on():
    mine = plt.figure()
    assert plot_log(MADE_UP, mine) is mine
    assert len(mine.axes) == 4
    before = plt.get_fignums()
    plot_log(MADE_UP)
    assert plt.get_fignums() == before
    plt.close(mine)


@pytest.mark.parametrize("history", [[], [{"train_loss": 0.6, "step": 4}]])
def test_an_empty_log_is_refused(history):
    with pytest.raises(ValueError, match="no entry of training or evaluation"):
        plot_log(history)


def test_prefixes():
    found = [evaluation_prefix(entry) for entry in MADE_UP]
    assert found == ["", "", "eval_", "", "eval_", ""]
