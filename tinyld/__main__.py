import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() hears it: Python's own would show what is imported

from tinyld.cli import main

if __name__ == "__main__":
    main()
