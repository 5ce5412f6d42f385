"""``python -m hf_prune``: the command line, as ``accelerate launch -m hf_prune`` starts it in several processes."""

from hf_prune.cli.main import main

if __name__ == "__main__":
    main()
