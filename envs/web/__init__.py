"""Web: tasks in real Chromium, MiniWoB++'s pages and one's own."""
