from tinyld.cli import main

if __name__ == "__main__":
    main()
