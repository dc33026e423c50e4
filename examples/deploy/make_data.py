"""Two clinics' tables, made from the breast cancer data that comes with scikit-learn."""

import csv
from pathlib import Path

from sklearn.datasets import load_breast_cancer


def main() -> None:
    data = load_breast_cancer()
    names = [n.replace(" ", "_") for n in data.feature_names]
    folder = Path("data")
    folder.mkdir(exist_ok=True)
    for site, rows in {"lyon": slice(0, 350), "oslo": slice(350, None)}.items():
        with open(folder / f"{site}.csv", "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow([*names, "malignant"])
            for x, y in zip(data.data[rows], data.target[rows], strict=True):
                writer.writerow([*x, "no" if y else "yes"])
        print(folder / f"{site}.csv")


if __name__ == "__main__":
    main()
