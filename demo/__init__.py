"""How the demo dataset was made: simulator, expert, imperfections, encoder. `sarm_lib` never imports this package."""
