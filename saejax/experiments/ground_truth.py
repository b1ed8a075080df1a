"""The ground_truth stage as a program."""

from saejax.experiments import binary

main = binary("ground_truth")

if __name__ == "__main__":
    main()
