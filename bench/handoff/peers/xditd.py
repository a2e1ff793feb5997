class Xditd:
    name = "xditd"
