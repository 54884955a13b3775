"""`python -m cmjax.native`: say whether the kernels run."""

from cmjax.native.library import status

if __name__ == "__main__":
    print(f"cmjax.native: {status().reason}")
