"""The commands of ``dalle-fast``, each a function that imports torch only when it runs, so that help is quick."""
