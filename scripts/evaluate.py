from medldm.commands.evaluate import main

main()
