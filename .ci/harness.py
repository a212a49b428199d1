"""Runs the stages of .ci/run, goes on after a failure, and counts what passed.

A slow test or a check is a function `test_*` of slow.py or checks.py. Each runs in a process and an empty
folder of its own; one function alone: `python .ci/harness.py slow test_name`."""
import ast, hashlib, importlib, json, os, re, signal, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMITS = dict(notebooks=12*60, slow=40*60, checks=10*60)  # seconds a stage may take
AT_ONCE = dict(slow=2, checks=1)  # functions of a stage that run side by side; those marked by_itself do not
TAIL = 60  # lines of a failure's log that are shown
WHY = 20  # lines of it that are shown once more at the end, where a log that was cut still has them
RUNNING = set()  # processes of tests and checks

def notebooks():
    return sorted(p for p in (ROOT/'nbs').glob('*.ipynb') if p.name[0] not in '_.')

def snapshot():
    "SHA-256 of every file that git tracks or does not ignore: tests and checks must leave it as it was"
    cmd = 'git ls-files -z --cached --others --exclude-standard'.split()
    names = subprocess.run(cmd, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split('\0')
    paths = {name: ROOT/name for name in names if name}
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in sorted(paths.items()) if p.is_file()}

def by_itself(test):
    "Marks a function that measures seconds, or asks for the whole machine"
    return test

def kill(proc):
    try:
        os.killpg(proc.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass

def run(cmd, cwd, limit):
    "Exit status (None when the time was up) and output of `cmd`; nothing that it started outlives it"
    with tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as log:
        proc = subprocess.Popen(cmd, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                start_new_session=True)
        RUNNING.add(proc)
        try:
            status = proc.wait(timeout=max(limit, 0))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            kill(proc)
            proc.wait()
            RUNNING.discard(proc)
        log.seek(0)
        return status, log.read() + (f'\nstopped: no time was left after {limit:.0f} s\n'
                                     if status is None else '')

def tell(ok, what, seconds, log, tail=TAIL):
    print(f"{'ok  ' if ok else 'FAIL'}  {seconds:6.1f} s  {what}")
    if not ok:
        print('\n'.join('      | ' + line for line in log.splitlines()[-tail:]))
    print(*re.findall(r'^skipped: .*$', log, re.M), sep='\n', end='\n' if 'skipped: ' in log else '')
    return ok

def traceback_of(what, log):
    "The lines of a log that belong to a notebook, or all of them"
    lines, name = log.partition('\nnbdev Tests Failed')[0].rstrip().splitlines(), what.partition(': ')[2]
    first = next((i for i, line in enumerate(lines) if line.rstrip(':').endswith(name)), None)
    if first is None:
        return lines
    ends = (i for i in range(first + 1, len(lines)) if re.search(r'\.ipynb:?$', lines[i]))
    return '\n'.join(lines[first:next(ends, len(lines))]).rstrip().splitlines()

def run_notebooks(limit):
    "README's test command; a notebook passes when it was completed and no traceback or list names it"
    start = time.time()
    status, log = run('nbdev_test --n_workers 2 --do_print'.split(), ROOT, limit)
    names = [p.name for p in notebooks()]
    done = set(re.findall(r'^- Completed .*?([^/\n]+\.ipynb)$', log, re.M))
    failed = set(re.findall(r'^(?:\t|\S+ in .*?)([^/\t\n]+\.ipynb):?$', log, re.M))
    results = {f'notebooks: {name}': name in done - failed for name in names}
    if status != 0 and all(results.values()):
        results['notebooks: nbdev_test itself'] = False
    bad = list(results.values()).count(False)
    said = re.sub(r'^(Starting|- Completed) .*\n', '', log, flags=re.M)
    tell(status == 0, f'notebooks: {len(results) - bad} of {len(results)}',
         time.time() - start, said, TAIL*(1+bad))
    return results, dict.fromkeys((what for what, ok in results.items() if not ok), said)

def functions(stage):
    "Names of a stage's functions: (those that may run side by side, the others)"
    tree = ast.parse((HERE/f'{stage}.py').read_text(encoding='utf-8'))
    found = [o for o in tree.body if isinstance(o, ast.FunctionDef) and o.name.startswith('test_')]
    single = [o.name for o in found if any(getattr(d, 'id', '') == 'by_itself' for d in o.decorator_list)]
    return [o.name for o in found if o.name not in single], single

def run_function(stage, name, end):
    start = time.time()
    with tempfile.TemporaryDirectory(prefix='sdip-ci-', ignore_cleanup_errors=True) as tmp:
        status, log = run([sys.executable, __file__, stage, name], tmp, end - start)
    return f'{stage}: {name}', status == 0, time.time() - start, log

def run_functions(stage, limit):
    end, results, logs = time.time() + limit, {}, {}
    for names, workers in zip(functions(stage), (AT_ONCE[stage], 1)):
        pool = ThreadPoolExecutor(workers)
        try:
            for job in as_completed([pool.submit(run_function, stage, name, end) for name in names]):
                what, ok, seconds, log = job.result()
                results[what] = tell(ok, what, seconds, log)
                if not ok:
                    logs[what] = log
        finally:  # also when the gate is stopped: no further one begins, and none goes on
            pool.shutdown(wait=False, cancel_futures=True)
            for proc in [*RUNNING]:
                kill(proc)
    return results, logs

def call(stage, name):
    "Runs one test function in this process"
    sys.path.insert(0, str(HERE))
    getattr(importlib.import_module(stage), name)()

def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is stopped with it
    with tempfile.NamedTemporaryFile('w', suffix='.json') as before:
        json.dump(snapshot(), before)
        before.flush()
        os.environ['SDIP_CI_BEFORE'] = before.name  # checks.py compares the tree with it
        results, logs = run_notebooks(LIMITS['notebooks'])
        for stage in 'slow', 'checks':
            more, why = run_functions(stage, LIMITS[stage])
            results |= more
            logs |= why
    failed = [what for what, ok in results.items() if not ok]
    for what in failed:
        print(f'failed: {what}')
        print('\n'.join('      | ' + line for line in traceback_of(what, logs[what])[-WHY:]))
    print(f'{len(results) - len(failed)} passed, {len(failed)} failed')
    return bool(failed)

if __name__ == '__main__':
    sys.exit(call(*sys.argv[1:]) if sys.argv[1:] else main())
