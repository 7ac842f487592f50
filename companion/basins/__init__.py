"""Result 5, basins (Li, Ding and Sun 2018-22): why bad basins disappear when the last hidden layer gets wide.

The network is ``f(x) = sum_j v_j sigma(w_j . x)`` (a bias is a constant column of X), the loss ``0.5 ||f - y||^2``.  A
*basin* is a compact set of weights that is strictly lower than everything nearby; it is bad if it is above ``inf L``.

- `certify_no_basin`: Theorem P' and its corollaries, from integers and exact ranks.
- `touching_points`, `plant_bad_minimum`, `exact_bad_minimum`: bad strict minima below the width (Theorems T and N).
- `certify_strict_minimum`: a proof for one network, in fractions, in balls, or by Kantorovich's theorem in floats.
- `descent_road`, `road_losses`: a road down from every start at width ``m >= q`` (Theorem Q).
- `certify_full_rank`: roads from almost everywhere, in a network of any depth.
- `train_lm_newton`, `classify_endpoints`: where training ends, one class for each kind of end.
- `exit_times`, `exit_time_of_e1`, `eyring_kramers`: how long noise needs to leave a bad basin.

The statements are derived in lesson 5; names of theorems are the lesson's."""

from companion.basins.certificates import certify_full_rank, certify_no_basin, certify_strict_minimum
from companion.basins.endpoints import CLASSES, classify_endpoints
from companion.basins.exact import ExactPoint
from companion.basins.examples import exact_bad_minimum, example_e1, example_e4, exit_time_of_e1
from companion.basins.langevin import exit_times, eyring_kramers
from companion.basins.planted import plant_bad_minimum, split_neuron, touching_points
from companion.basins.roads import descent_road, road_losses
from companion.basins.shallow import dual_function, loss_derivatives, train_lm_newton

__all__ = [
    "CLASSES",
    "ExactPoint",
    "certify_full_rank",
    "certify_no_basin",
    "certify_strict_minimum",
    "classify_endpoints",
    "descent_road",
    "dual_function",
    "exact_bad_minimum",
    "example_e1",
    "example_e4",
    "exit_time_of_e1",
    "exit_times",
    "eyring_kramers",
    "loss_derivatives",
    "plant_bad_minimum",
    "road_losses",
    "split_neuron",
    "touching_points",
    "train_lm_newton",
]
