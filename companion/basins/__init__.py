"""Result 5, basins (Li, Ding and Sun 2018-22): why bad basins disappear when the last hidden layer gets wide.

The network is ``f(x) = sum_j v_j sigma(w_j . x)`` (a bias is a constant column of X), the loss ``0.5 ||f - y||^2``.  A
*basin* is a compact set of weights that is strictly lower than everything nearby; it is bad if it is above ``inf L``.

- `no_basin`: Theorem P' and its corollaries, from integers and exact ranks.
- `plant_bad_minimum`, `exact_bad_minimum`, `touching_points`: bad strict minima below the width (Theorems T and N).
- `certify_strict_minimum`: a proof for one network, in fractions, in balls, or by Kantorovich's theorem.
- `descent_road`, `road_losses`: a road down from every start at width ``m >= q`` (Theorem Q).
- `train_lm_newton`, `classify_endpoints`: where training ends, one class for each kind of end.
- `langevin_exit_times`, `exit_time_pde`, `eyring_kramers`: how long noise needs to leave a bad basin.

The statements are derived in lesson 5; names of theorems are the lesson's."""

from companion.basins.certificates import (
    Kantorovich,
    certify_strict_minimum,
    kantorovich,
)
from companion.basins.exact import (
    ExactPoint,
)
from companion.basins.langevin import exit_times as langevin_exit_times
from companion.basins.langevin import eyring_kramers
from companion.basins.planted import (
    CLASSES,
    Endpoints,
    ExactMinimum,
    Planted,
    TouchingPoints,
    add_silent_neuron,
    classify_endpoints,
    exact_bad_minimum,
    example_e1,
    example_e4,
    exit_time_pde,
    no_basin,
    plant_bad_minimum,
    split_neuron,
    touching_points,
)
from companion.basins.roads import (
    Road,
    descent_road,
    full_rank_certificate,
    road_losses,
)
from companion.basins.shallow import (
    Trained,
    dual_function,
    loss_derivatives,
    train_lm_newton,
)

__all__ = [
    "CLASSES",
    "Endpoints",
    "ExactMinimum",
    "ExactPoint",
    "Kantorovich",
    "Planted",
    "Road",
    "TouchingPoints",
    "Trained",
    "add_silent_neuron",
    "certify_strict_minimum",
    "classify_endpoints",
    "descent_road",
    "dual_function",
    "exact_bad_minimum",
    "example_e1",
    "example_e4",
    "exit_time_pde",
    "eyring_kramers",
    "full_rank_certificate",
    "kantorovich",
    "langevin_exit_times",
    "loss_derivatives",
    "no_basin",
    "plant_bad_minimum",
    "road_losses",
    "split_neuron",
    "touching_points",
    "train_lm_newton",
]
