"""Hostile programs for sandboxes. Each is bounded, and prints ESCAPED where a wall did not hold."""

# ruff: noqa: E501

from __future__ import annotations

LIBC = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True)\n"


def _call(name: str, *arguments: str, wins: str = "result >= 0") -> str:
    return f"{LIBC}result = libc.{name}({', '.join(arguments)})\nprint('ESCAPED' if {wins} else os.strerror(ctypes.get_errno()))"


def _attempt(code: str, otherwise: str = "OSError") -> str:
    lines = "\n".join("    " + line for line in code.splitlines())
    return f"import os, socket, subprocess, sys\ntry:\n{lines}\n    print('ESCAPED')\nexcept {otherwise} as error:\n    print('held', error)"


# {secret}: a file of the host's; {port}, {udp}, {path}: listeners of the test's own; {pid}: a process of the host's
ATTACKS: dict[str, str] = {
    # the network
    "tcp to loopback": _attempt("socket.create_connection(('127.0.0.1', {port}), 1)"),
    "udp to loopback": _attempt("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {udp}))"),
    "tcp over ipv6": _attempt("socket.create_connection(('::1', {port}), 1)"),
    "unix socket by path": _attempt("s = socket.socket(socket.AF_UNIX); s.connect({path!r})"),
    "abstract unix socket": _attempt("s = socket.socket(socket.AF_UNIX); s.connect(chr(0) + {abstract!r})"),
    "raw socket": _attempt("socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"),
    "netlink": _attempt("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).send(b'x' * 16)"),
    "listening": _attempt("s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()"),
    "socket by system call": _call("syscall", "41", "2", "1", "0"),
    "a datagram to whoever listens": _attempt("socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)"),
    "a packet to whoever listens": _attempt("socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)"),
    "descriptors in flight": _attempt(
        "pair = socket.socketpair(); socket.send_fds(pair[0], [b'x'], [pair[1].fileno()])"
    ),
    "a name for a socket": _attempt("socket.socketpair()[0].bind(chr(0) + 'treegym-was-here')"),
    # the host's files
    "shadow": _attempt("open('/etc/shadow').read()"),
    "a secret by path": _attempt("open({secret!r}).read()"),
    "a secret through a symlink": _attempt("os.symlink({secret!r}, 'link'); open('link').read()"),
    "a secret through /proc/1/root": _attempt("open('/proc/1/root' + {secret!r}).read()"),
    "a secret through /proc/self/root": _attempt("open('/proc/self/root' + {secret!r}).read()"),
    "a secret upwards": _attempt("open('../' * 20 + {secret!r}.lstrip('/')).read()"),
    "home folders": _attempt(
        "[open(os.path.join(p, f)).read() for p, _, fs in os.walk('/home') for f in fs][0]", "(OSError, IndexError)"
    ),
    "a hard link to a system file": _attempt("os.link('/usr/bin/env', 'env'); open('env', 'a').write('x')"),
    "writing to the system": _attempt("open('/usr/lib/treegym-was-here', 'w')"),
    "writing to the root": _attempt("open('/treegym-was-here', 'w')"),
    "writing to the interpreter": _attempt("open(os.__file__, 'a')"),
    "writing to its own program": _attempt("open('/run/inside/guest_keeper.py', 'a')"),
    "writing to devices": _attempt("open('/dev/treegym-was-here', 'w')"),
    "shared memory": _attempt("open('/dev/shm/treegym-was-here', 'w').write('x')"),
    "reading a disk": _attempt(
        "[open('/dev/' + d, 'rb').read(1) for d in os.listdir('/dev') if d.startswith(('sd', 'vd', 'nvme'))][0]",
        "(OSError, IndexError)",
    ),
    "making a device": _attempt("os.mknod('disk', 0o60600, os.makedev(8, 0)); open('disk', 'rb').read(1)"),
    "open by handle": _call("syscall", "304", "-100", "ctypes.create_string_buffer(24)", "0"),
    # other processes
    "environment of the first process": "try: text = open('/proc/1/environ').read()\nexcept OSError as error: text = str(error)\nprint('ESCAPED' if {marker!r} in text else 'held')",
    "its own environment": "import os\nprint('ESCAPED' if {marker!r} in str(os.environ) else 'held')",
    "memory of the first process": _attempt("open('/proc/1/mem', 'rb')"),
    "the parent's memory": _attempt("open(f'/proc/{{os.getppid()}}/mem', 'r+b')"),
    "a host process by number": _attempt(
        "os.kill({pid}, 0); open('/proc/{pid}/cmdline').read().index({marker!r})", "(OSError, ValueError)"
    ),
    "command lines of the host": "import os\ntexts = [open(f'/proc/{{p}}/cmdline').read() for p in os.listdir('/proc') if p.isdigit()]\nprint('ESCAPED' if any({marker!r} in text for text in texts) else 'held')",
    "ptrace attach": _call("ptrace", "16", "os.getppid()", "0", "0"),
    "ptrace by system call": _call("syscall", "101", "16", "1", "0", "0"),
    "process_vm_readv": _call("syscall", "310", "os.getppid()", "0", "0", "0", "0", "0"),
    "killing the first process": _attempt("os.kill(1, 9); import time; time.sleep(0.2); raise OSError('still here')"),
    # the kernel
    "mount": _call("mount", "b'none'", "b'/mnt'", "b'tmpfs'", "0", "None"),
    "bind mount": _call("mount", "b'/'", "b'/mnt'", "None", "4096", "None"),
    "remount writable": _call("mount", "None", "b'/'", "None", "4096 | 32", "None"),
    "unmount": _call("umount2", "b'/proc'", "2"),
    "unmounting its files": _attempt(
        "os.chdir('/'); import ctypes; libc = ctypes.CDLL(None, use_errno=True)\nif libc.umount2(b'/episode', 2): raise OSError(ctypes.get_errno(), 'umount')"
    ),
    "moving its files": _call("mount", "b'/episode'", "b'/tmp'", "None", "8192", "None"),
    "what lies aside": _attempt("os.listdir('/mnt/aside')"),
    "opening what is closed": _attempt("os.chmod('/mnt', 0o777)"),
    "new mount interface": _call("syscall", "430", "b'tmpfs'", "0"),
    "open_tree": _call("syscall", "428", "-100", "b'.'", "1"),
    "open_tree_attr": _call("syscall", "467", "-100", "b'.'", "1", "None", "0"),
    "a user namespace": _call("unshare", "0x10000000"),
    "a user and mount namespace": _call("unshare", "0x10020000"),
    "a network namespace": _call("unshare", "0x40000000"),
    "a namespace by clone": LIBC
    + "pid = libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)\nif pid == 0:\n    os._exit(0)\nprint('ESCAPED' if pid > 0 else 'held')",
    "a namespace by clone3": LIBC
    + "import struct\nargs = ctypes.create_string_buffer(struct.pack('8Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0))\npid = libc.syscall(435, args, 64)\nif pid == 0:\n    os._exit(0)\nprint('ESCAPED' if pid > 0 else 'held')",
    "entering the first process's namespaces": _attempt(
        "fd = os.open('/proc/1/ns/mnt', os.O_RDONLY); import ctypes; assert ctypes.CDLL(None).setns(fd, 0) == 0",
        "(OSError, AssertionError)",
    ),
    "chroot": _attempt("os.chroot('.')"),
    "pivot_root": _call("syscall", "155", "b'.'", "b'.'"),
    "bpf": _call("syscall", "321", "0", "0", "0", wins="ctypes.get_errno() not in (1, 38)"),
    "perf events": _call("syscall", "298", "0", "0", "-1", "-1", "0", wins="ctypes.get_errno() not in (1, 38)"),
    "io_uring": _call("syscall", "425", "1", "ctypes.create_string_buffer(120)"),
    "userfaultfd": _call("syscall", "323", "0"),
    "the keyring": _call("syscall", "248", "b'user'", "b'x'", "b'y'", "1", "-4"),
    "personality": _call("personality", "0x0040000"),
    "host name": _attempt("import socket; socket.sethostname('owned')"),
    "kernel settings": _attempt("open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/true')"),
    "sysrq": _attempt("open('/proc/sysrq-trigger', 'w').write('h')"),
    "becoming root": _attempt("os.setuid(0); assert os.getuid() == 0", "(OSError, AssertionError)"),
    "a set-user program": _attempt(
        "out = subprocess.run(['su', '-c', 'id -u'], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout; assert out.strip() == '0'",
        "(OSError, AssertionError)",
    ),
    "limits of the first process": _attempt("import resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))"),
    "limits of another process": _attempt(
        "import resource, signal, time\npid = os.fork()\nif not pid: time.sleep(5); os._exit(0)\ntry: resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))\nfinally: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)"
    ),
    "priority of the first process": _attempt("os.setpriority(os.PRIO_PROCESS, 1, 19)"),
    "priority of all processes": _attempt("os.setpriority(os.PRIO_USER, 0, 19)"),
    "processors of the first process": _attempt("os.sched_setaffinity(1, [0])"),
    "scheduling of the first process": _attempt("os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))"),
    "disk priority of the first process": _call("syscall", "251", "1", "1", "3 << 13"),
    "a lease on a file": _attempt(
        "import fcntl; fcntl.fcntl(os.open('leased', os.O_RDWR | os.O_CREAT), fcntl.F_SETLEASE, fcntl.F_WRLCK)"
    ),
    "lifting limits": _attempt(
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "(OSError, ValueError)"
    ),
    "terminal input": _attempt("import fcntl; fcntl.ioctl(0, 0x5412, b'x')"),
    "anonymous files": _attempt("os.memfd_create('x')"),
    # the host's files, by what the kernel tells and keeps of them
    "watching the host's programs": _call("inotify_init1", "0"),
    "watching a folder": _attempt("import fcntl; fcntl.fcntl(os.open('/usr/bin', os.O_RDONLY), fcntl.F_NOTIFY, 1)"),
    "a lease": _attempt(
        "import fcntl; open('own', 'w').close(); fcntl.fcntl(os.open('own', os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)"
    ),
    "what the host has in memory": _call("syscall", "451", "os.open('/usr/bin/env', 0)", "bytes(16)", "bytes(40)", "0"),
    "system v memory": _call("shmget", "1234", "4096", "0o1600"),
}

# What they use up is bounded by themselves as well, so that a hole does not take the machine along.
GREED: dict[str, str] = {
    "fork bomb": """
import os, time
born = 0
try:
    while born < 200:
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)
        born += 1
except OSError as error:
    print('held', error)
if born > 64: print('ESCAPED', born)
""",
    "threads": """
import threading, time
born = []
try:
    while len(born) < 200:
        born.append(threading.Thread(target=time.sleep, args=(1,))); born[-1].start()
except RuntimeError as error:
    print('held', error)
if len(born) > 65: print('ESCAPED', len(born))
""",
    "memory of one process": _attempt("x = bytearray(600 << 20)", "MemoryError"),
    "memory by mapping": _attempt(
        "import mmap; m = mmap.mmap(-1, 600 << 20); m.write(b'x' * (600 << 20))", "(OSError, MemoryError, ValueError)"
    ),
    "filling the disk": """
written = 0
try:
    while written < 200 << 20:
        with open(f'fill{{written}}', 'wb') as file: file.write(bytes(8 << 20))
        written += 8 << 20
except OSError as error:
    print('held', error)
if written > 64 << 20: print('ESCAPED', written)
""",
    "filling temporary files": """
import tempfile
files = []
try:
    while len(files) < 25:
        files.append(tempfile.TemporaryFile()); files[-1].write(bytes(8 << 20)); files[-1].flush()
except OSError as error:
    print('held', error)
if len(files) > 9: print('ESCAPED', len(files))
""",
    "one large file": _attempt("with open('large', 'wb') as file:\n    for _ in range(60): file.write(bytes(1 << 20))"),
    "a sparse file": _attempt("open('sparse', 'wb').truncate(1 << 40)"),
    "many files": """
made = 0
try:
    while made < 40000:
        open(f'n{{made}}', 'w').close(); made += 1
except OSError as error:
    print('held', error)
if made > 20000: print('ESCAPED', made)
""",
    "many open files": """
held = []
try:
    while len(held) < 2000: held.append(open('/dev/null'))
except OSError as error:
    print('held', error)
if len(held) > 300: print('ESCAPED')
""",
    "queued signals": """
import ctypes, os, signal
libc = ctypes.CDLL(None)
signal.pthread_sigmask(signal.SIG_BLOCK, [40])
queued = 0
while queued < 2000 and libc.sigqueue(os.getpid(), 40, None) == 0: queued += 1
print('held' if queued < 300 else 'ESCAPED', queued)
""",
    "timers": """
import ctypes
libc = ctypes.CDLL(None)
made = 0
while made < 2000 and libc.timer_create(1, None, ctypes.byref(ctypes.c_void_p())) == 0: made += 1
print('held' if made < 300 else 'ESCAPED', made)
""",
    "pages of pipes": _attempt("import fcntl; fcntl.fcntl(os.pipe()[1], fcntl.F_SETPIPE_SZ, 1 << 20)"),
    "memory that stays": _attempt(
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\nif libc.mlockall(3): raise OSError(ctypes.get_errno(), 'mlockall')"
    ),
    "requests of files": _call("syscall", "206", "60000", "ctypes.byref(ctypes.c_long(0))"),
    "a zip bomb": """
import io, zipfile
box = io.BytesIO()
with zipfile.ZipFile(box, 'w', zipfile.ZIP_DEFLATED) as z:
    with z.open('zeros', 'w') as f:
        for _ in range(200): f.write(bytes(1 << 20))
try:
    zipfile.ZipFile(box).extractall('.'); print('ESCAPED')
except OSError as error:
    print('held', error)
""",
    "endless output": "for _ in range(300000): print('x' * 999)",
    "endless output of a program": "import subprocess; subprocess.run('head -c 200000000 /dev/zero', shell=True)",
    "an endless loop": "while True: pass",
    "a loop deaf to signals": """
import signal
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True:
    try:
        while True: pass
    except BaseException: pass
""",
    "sleeping": "import time; time.sleep(60)",
    "a sleeping child": "import subprocess; subprocess.run(['sleep', '60'])",
    "endless recursion": "f = lambda: f()\nf()",
    "recursion in the parser": _attempt("eval('(' * 5000 + ')' * 5000)", "(SyntaxError, MemoryError)"),
    "recursion in C": "import sys; sys.setrecursionlimit(10**6); f = lambda: f()\nf()",
    "a large number": "10 ** 10 ** 8",
    "a daemon": """
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execvp('sleep', [{daemon!r}, '30'])
    os._exit(0)
""",
}

# On the program that reads the calls: afterwards the next call must be answered, in turn and in truth.
MACHINERY: dict[str, str] = {
    "exit": "import sys; sys.exit(3)",
    "hard exit": "import os; os._exit(0)",
    "killing itself": "import os; os.kill(os.getpid(), 9)",
    "crashing": "import ctypes; ctypes.string_at(0)",
    "closing every file": "import os; os.closerange(0, 256)",
    "closing standard output": "import sys; sys.stdout.close(); sys.stderr.close()",
    "no print": "import builtins; builtins.print = None; builtins.open = None; builtins.repr = None; builtins.len = None",
    "no json": "import json; json.dumps = json.loads = None; json.JSONEncoder = None",
    "no os": "import os; os.dup2 = os.pread = os.ftruncate = os.fstat = None",
    "no resource": "import resource; resource.setrlimit = None; resource.getrusage = None",
    "no compiler": "import ast, builtins; ast.parse = None; builtins.compile = None; builtins.exec = None; builtins.eval = None",
    "an endless repr": "class A:\n    def __repr__(self):\n        while True: pass\nA()",
    "a repr that exits": "class A:\n    def __repr__(self):\n        raise SystemExit\nA()",
    "an error without a text": "class E(Exception):\n    def __str__(self): raise KeyboardInterrupt\nraise E",
    "an interrupt": "raise KeyboardInterrupt",
    "a trace function": "import sys; sys.settrace(lambda *a: 1 / 0)",
    "an alarm": "import signal; signal.signal(signal.SIGALRM, lambda *a: 1 / 0); signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)",
    "an exit handler": "import atexit, time; atexit.register(time.sleep, 60)",
    "forged answers": """
import os, json, struct
text = json.dumps(dict(text='FORGED', bytes=6, failed=False)).encode()
for fd in range(3, 64):
    try:
        if os.readlink(f'/proc/self/fd/{{fd}}').startswith('socket:'):
            for _ in range(5): os.write(fd, struct.pack('!I', len(text)) + text)
    except OSError: pass
""",
    "a forged length": """
import os, struct
for fd in range(3, 64):
    try:
        if os.readlink(f'/proc/self/fd/{{fd}}').startswith('socket:'): os.write(fd, struct.pack('!I', 0xffffffff) + b'x' * 100)
    except OSError: pass
""",
    "forged nonsense": """
import os, struct
for fd in range(3, 64):
    try:
        if os.readlink(f'/proc/self/fd/{{fd}}').startswith('socket:'): os.write(fd, struct.pack('!I', 8) + b'[' * 8)
    except OSError: pass
""",
    "another program for the calls": """
import gc
for thing in gc.get_objects():
    if type(thing).__name__ == 'Interpreter': type(thing).run = lambda self, code: dict(text=7, bytes='x', failed=None)
""",
    "surrogates": "print('\\ud800\\udfff')",
    "terminal escapes": "print('\\x1b]0;owned\\x07\\x1b[2J\\x9b31m')",
    "directions of text": "print('\\u202e\\u2066reversed')",
    "bytes that are no text": "import os; os.write(1, bytes(range(256)))",
}

# What must end with its call, and with its episode. Each runs until the deadline; what it leaves is called {mark}, and
# writes to the file `beat`.
_MARK = "import ctypes, os, signal, sys, threading, time; libc = ctypes.CDLL(None); end = time.time() + 60\n"
_BEAT = """
def beat():
    libc.prctl(15, b'{mark}', 0, 0, 0)
    while time.time() < end:
        with open('beat', 'a') as file: file.write('x')
        time.sleep(0.02)
"""
_LINGERING = {
    "a thread whose leader exited": """
if not os.fork():
    threading.Thread(target=beat).start()
    libc.syscall(60, 0)
""",
    "processes below a leader that exited": """
def branch():
    if not os.fork(): beat()
    beat()
if not os.fork():
    threading.Thread(target=branch).start()
    time.sleep(0.1)
    libc.syscall(60, 0)
""",
    "the interpreter's own leader exiting": """
threading.Thread(target=beat).start()
time.sleep(0.1)
libc.syscall(60, 0)
""",
    "a session of its own": """
if not os.fork():
    os.setsid()
    if not os.fork(): beat()
    os._exit(0)
""",
    "a child of the keeper": """
libc.prctl(36, 0, 0, 0, 0)
if not os.fork():
    if not os.fork(): beat()
    os._exit(0)
""",
    "a sibling of the interpreter": """
if not libc.syscall(56, 0x8000 | 17, 0, 0, 0, 0): beat()
""",
    "processes that each end at once": """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def run():
    libc.prctl(15, b'{mark}', 0, 0, 0)
    while time.time() < end:
        try:
            if os.fork(): os._exit(0)
            fd = os.open('beat', os.O_WRONLY | os.O_CREAT | os.O_APPEND); os.write(fd, b'x'); os.close(fd)
        except OSError: pass
for _ in range(3):
    if not os.fork(): run()
""",
    "as many processes as there may be": """
try:
    while True:
        if not os.fork(): beat()
except OSError: pass
""",
    "a process deaf to signals": """
if not os.fork():
    for number in range(1, 65):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    beat()
""",
    "a stopped process": """
pid = os.fork()
if not pid: beat()
time.sleep(0.2)
os.kill(pid, signal.SIGSTOP)
""",
}
LINGERING = {name: f"{_MARK}{_BEAT}{code}\ntime.sleep(60)" for name, code in _LINGERING.items()}

# What a branch keeps over a fork to reach the other, with our own checks patched away: the fork must be refused.
KEEPING: dict[str, str] = {
    "the parent's channel": "ours.Channel.close = lambda self: None",
    "the meeting": "real = ours.fork_beside\ndef beside():\n    global kept\n    copy = real()\n    if not copy: kept = [os.dup(fd) for fd in range(3, 30) if os.path.exists(f'/proc/self/fd/{fd}')]\n    return copy\nours.fork_beside = beside",
    "a pair of sockets": "import socket\nours.Interpreter._files = lambda self, but: []\npair = socket.socketpair()",
    "a pipe": "ours.Interpreter._files = lambda self, but: []\npipe = os.pipe()",
    "the folder of its parent's files": "real = ours.Interpreter._files\nfolder = os.open('.', os.O_RDONLY)\nours.Interpreter._files = lambda self, but: real(self, but | {folder})",
    "a file of its parent's": "real = ours.Interpreter._files\nfile = os.open('kept', os.O_RDWR | os.O_CREAT)\nours.Interpreter._files = lambda self, but: real(self, but | {file})",
    "its working folder": "os.chdir = lambda *_: None",
    "shared memory": "import mmap\nours.Interpreter._check_memory = lambda self: None\nmemory = mmap.mmap(-1, 4096)",
    "a thread": "import threading, time\nours.Interpreter._check_processes = lambda self: None\nthreading.Thread(target=time.sleep, args=(9,)).start()",
    "a child": "import time\nours.Interpreter._check_processes = lambda self: None\nif not os.fork(): time.sleep(9); os._exit(0)",
    "a process beside it": "import time\nif ours.fork_beside(): time.sleep(9); os._exit(0)",
}

# Once it has met its keeper, the fork goes to another mount namespace: where its parent's files are mounted, or its own.
LEAVING = """
import sys
ours = sys.modules['inside.guest_interpreter']
Socket = ours.socket.socket
class Leaving(Socket):
    def send(self, *data): return Socket.send(self, *data), ours.libc.unshare(0x20000)
ours.socket = type('module', (), dict(ours.socket.__dict__, socket=Leaving))
open('whose', 'w').write("the parent's")
"""
