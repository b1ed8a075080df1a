"""Behaviours and benchmarks before anything is explained, as a program."""

from saejax.experiments import binary

main = binary("baseline", "benchmark")

if __name__ == "__main__":
    main()
