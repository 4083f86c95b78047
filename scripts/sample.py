from medldm.commands.sample import main

main()
