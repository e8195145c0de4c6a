from tknp.cli import main

main()
