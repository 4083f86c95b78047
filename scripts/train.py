from medldm.commands.train import main

main()
