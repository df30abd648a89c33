"""Search a classifier's parameters on scikit-learn's digits; results are shown as they come."""

from itertools import product

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

import hpcray

GRID = list(product([0.1, 1.0, 10.0], [0.0001, 0.001, 0.01]))
FOLDS = 3


def accuracy(images: np.ndarray, digits: np.ndarray, c: float, gamma: float) -> float:
    return float(cross_val_score(SVC(C=c, gamma=gamma), images, digits, cv=FOLDS).mean())


@hpcray.remote
def evaluate(images: np.ndarray, digits: np.ndarray, c: float, gamma: float) -> float:
    return accuracy(images, digits, c, gamma)


def best_of(accuracies: dict[tuple[float, float], float]) -> tuple[float, float]:
    """Return the point of highest accuracy; among equals the first of the grid, whichever came first."""
    return max(GRID, key=lambda point: accuracies[point])


def main() -> None:
    hpcray.init()
    images, digits = load_digits(return_X_y=True)
    images_ref, digits_ref = hpcray.put(images), hpcray.put(digits)

    point_of = {evaluate.remote(images_ref, digits_ref, *point): point for point in GRID}
    accuracies = {}
    pending = list(point_of)
    while pending:
        [done], pending = hpcray.wait(pending, num_returns=1)
        c, gamma = point_of[done]
        accuracies[c, gamma] = hpcray.get(done)
        print(f"C={c:<5} gamma={gamma:<7} accuracy {accuracies[c, gamma]:.4f}")

    best = best_of(accuracies)
    print(f"best: C={best[0]}, gamma={best[1]}, accuracy {accuracies[best]:.4f}")

    sequential = {point: accuracy(images, digits, *point) for point in GRID}
    equal = best == best_of(sequential) and accuracies == sequential
    print(f"equal to a sequential search: {'yes' if equal else 'no'}")
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
