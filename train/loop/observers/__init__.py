"""What happens between steps. Each observer is called after every step on every rank; none of them waits for the
device except on the steps it acts on."""
