"The form of the repository: what no notebook can test about itself. Run by .ci/run; see harness.py."
import ast, json, os, re, resource, subprocess, sys, tempfile
from collections import Counter
from pathlib import Path
import yaml
from harness import ROOT, notebooks, snapshot

def cells(path, kind=None):
    return [
        c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if kind in (None, c['cell_type'])
    ]

def source(cell):
    return ''.join(cell['source'])

def none(faults, rule):
    faults = list(faults)
    assert not faults, f'{rule}:\n' + '\n'.join(f'  {o}' for o in faults)

def settings():
    from configparser import ConfigParser
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']

# notebooks

def test_kernelspecs():
    names = {
        p.name: json.loads(p.read_text(encoding='utf-8'))['metadata'].get('kernelspec', {}).get('name')
        for p in notebooks()
    }
    none((f'{p}: {k}' for p, k in names.items() if k != 'python3'),
         'kernelspec must be python3, or Kaggle stops before cell 1')

def test_sources_are_lists_of_lines():
    none((f"{p.name} {c['id']}" for p in notebooks() for c in cells(p) if not isinstance(c['source'], list)),
         'a source must be a list of lines: Quarto loses the line breaks of one string')

def test_cell_ids():
    ids = {p.name: Counter(c.get('id') for c in cells(p)) for p in notebooks()}
    none((f'{p}: {i}' for p, count in ids.items() for i, n in count.items() if n > 1 or not i),
         'every cell needs an id of its own')

def test_openings():
    form = re.compile(r'# \S.*\n\n> \S.*(\n\n(- \w+: .*\n?)+)?\s*$')
    none((
        p.name
        for p in notebooks()
        if not form.match(source(cells(p)[0])) or cells(p)[0]['cell_type'] != 'markdown'
    ), 'the first cell holds "# Title", an empty line and "> one sentence", nothing else: '
        'the site drops the rest'
         )

def imports(code):
    "Names of the modules that a cell imports"
    code = '\n'.join('pass' if re.match(r'\s*[%!]', line) else line for line in code.splitlines())
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (o.name for o in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ''

def test_no_notebook_imports_nbdev():
    none((f"{p.name} {c['id']}" for p in notebooks() for c in cells(p, 'code')
          if not source(c).startswith('%%') and any(m.split('.')[0] == 'nbdev' for m in imports(source(c)))),
         'nbdev is a tool of development: where sdip runs it is absent')

def test_outputs_are_small():
    sizes = {p.name: sum(len(json.dumps(c['outputs'])) for c in cells(p, 'code')) for p in notebooks()}
    none((f'{p}: {n:,} bytes' for p, n in sizes.items() if n >= 150_000),
         'outputs of a notebook stay under 150 kB')

def test_outputs_name_no_machine():
    told = re.compile(r'/(?:root|home|tmp|Users)/\S+| object at 0x')
    text = lambda out: json.dumps([
        out.get('text'),
        out.get('traceback'), {k: v
                               for k, v in out.get('data', {}).items()
                               if 'image/' not in k}
    ])
    none((f"{p.name} {c['id']}: {m[0]}" for p in notebooks() for c in cells(p, 'code')
          for o in c['outputs'] if (m := told.search(text(o)))),
         'outputs hold no absolute path and no address')

def alt(cell):
    """Alt text of a cell's figures, as Quarto reads it: YAML after #|, on one line, since nbdev keeps no
    second"""
    lines = re.findall(r'^#\| (fig-alt: .*)$', source(cell), re.M)
    return yaml.safe_load('\n'.join(lines)).get('fig-alt') if lines else None

def test_figures_have_alt_text():
    drawn = lambda cell: any(k.startswith('image/') for o in cell['outputs'] for k in o.get('data', {}))
    none((f"{p.name} {c['id']}" for p in notebooks()
          for c in cells(p, 'code') if drawn(c) and len(str(alt(c) or '')) < 15),
         'a cell with a figure starts with a line: #| fig-alt: "what a person would see"')

def unguarded(code):
    "Statements of a marked cell that Jupyter would run on any machine, and that may cost something"
    tree = ast.parse(code)

    def costs(node):  # a call that is no constructor of a small thing, outside functions
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            return False
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if not (name[0].isupper() or name in ('dict', 'list', 'tuple', 'set')):
                return True
        return any(map(costs, ast.iter_child_nodes(node)))

    def guards(node):
        asked = ast.unparse(node.test) if isinstance(node, ast.If) and not node.orelse else ''
        return asked == 'torch.cuda.is_available()' or re.match(r"slow\('.{5,}'\)$", asked) is not None

    return [ast.unparse(o) for o in tree.body if not guards(o) and costs(o)]

def test_marked_cells_are_guarded():
    """Jupyter knows no flags: a cell marked gpu or slow asks for a card, or waits for SDIP_SLOW, and one of
    eval: false would run there"""
    none((f"{p.name} {c['id']}: {o}" for p in notebooks() for c in cells(p, 'code')
          if re.search(r'^#\| (gpu|slow|notest|eval: *false)\b', source(c), re.M)
          for o in unguarded(source(c))),
         "in a cell marked slow or gpu all work stands under if slow('3 CPU minutes'): (sdip.kaggle) "
         'or if torch.cuda.is_available():')
    test = unguarded("x = Box(1)\nif slow('3 CPU minutes'):\n    work()")
    assert test == [] and unguarded('y = work()') == ['y = work()'], test

# how it reads

LINE, CELLS, LONG = 110, 75, 30  # columns; cells of a notebook; lines of a code cell
EXPORTED, PUBLIC = 450, 260  # lines a module, names in all
# notebook: ids of cells that are one thought and longer than LONG
LONG_CELLS = {'08_run': ['command-run']}

def exported(cell):
    return re.match(r'#\| (export|exporti|exports)\b', source(cell)) is not None

def lines(cell):
    return [o for o in source(cell).splitlines() if o.strip() and not o.startswith('#|')]

def own(path, kind='code'):
    return [c for c in cells(path, kind) if c['id'] not in ('home', 'imports', 'imports-tests')]

def ruff(*args, **kw):
    return subprocess.run([
        Path(sys.executable).parent/'ruff', 'check', '--isolated', '--no-cache', '--line-length',
        str(LINE), '--output-format', 'concise', '--select', 'E4,E7,E9,E501,F', '--ignore', 'E731', *args
    ], text=True, capture_output=True, **kw)

def test_ruff():
    "One statement a line, lines one can read, no name unused or unknown"
    found = ruff('--exclude', 'sdip/_modidx.py', 'sdip', cwd=ROOT)
    texts = {p.name: p.read_text(encoding='utf-8').splitlines() for p in (ROOT/'sdip').glob('*.py')}

    def written_by_nbdev(said):  # the lines of __all__, which nbdev breaks where it likes
        m = re.match(r'sdip/(\w+\.py):(\d+):\d+: E501', said)
        return m and re.match(r"__all__ = \['|           '", texts[m[1]][int(m[2]) - 1])

    faults = [
        o for o in found.stdout.splitlines() if re.match(r'\S+:\d+:\d+:', o) and not written_by_nbdev(o)
    ]
    none(faults + ([found.stderr] if found.returncode > 1 else []), f'ruff, at {LINE} columns')

def test_cells_read_like_modules():
    "Demonstrations and tests keep the same lines: each code cell alone, where a name may come from another"
    with tempfile.TemporaryDirectory() as d:
        for p in notebooks():
            for c in cells(p, 'code'):
                if not re.search(r'^\s*[%!]', source(c), re.M):
                    code = ''.join(o for o in c['source'] if not o.startswith('#|'))
                    (Path(d)/f"{p.stem}.{c['id']}.py").write_text(code + '\n', encoding='utf-8')
        found = ruff('--ignore', 'F,E402,E703', d)  # a last ; keeps a value from being shown
    assert found.returncode == 0, found.stdout.replace(d + os.sep, '') + found.stderr

def test_form_of_chapters():
    "What a reader meets: printed as a report; what is over the limits fails"
    faults, names = [], Counter()
    print(f"{'notebook':24} cells  exported  first output  code cells, lines: median, 90 %, longest")
    for p in notebooks():
        every, code = cells(p), [c for c in own(p) if lines(c)]
        size = sorted(len(lines(c)) for c in code) or [0]
        out = sum(len(lines(c)) for c in code if exported(c) and not source(c).startswith('#| export cli'))
        first = next((i for i, c in enumerate(every, 1) if c.get('outputs')), 0)
        print(
            f'{p.stem:24} {len(every):5}  {out:8}  {first:12}  '
            f'{size[len(size)//2]}, {size[int(.9*len(size))]}, {size[-1]}'
        )
        if len(every) > CELLS:
            faults.append(f'{p.name} has {len(every)} cells')
        if out > EXPORTED:
            faults.append(f'{p.name} exports {out} lines')
        if not 0 < first <= 10:
            faults.append(f'{p.name} shows nothing within its first ten cells')
        faults += [
            f"{p.name} {c['id']} has {len(lines(c))} lines" for c in code
            if len(lines(c)) > LONG and c['id'] not in LONG_CELLS.get(p.stem, ())
        ]
    for p in sorted((ROOT/'sdip').glob('[!_]*.py')):
        tree = ast.parse(p.read_text(encoding='utf-8'))
        [found] = [
            ast.literal_eval(o.value)
            for o in tree.body
            if isinstance(o, ast.Assign) and ast.unparse(o.targets[0]) == '__all__'
        ]
        names[p.stem] = len(found)
    print(f'{sum(names.values())} public names:', ', '.join(f'{m} {n}' for m, n in names.items()))
    if sum(names.values()) > PUBLIC:
        faults.append(f'{sum(names.values())} public names')
    none(
        faults,
        f'cells a notebook up to {CELLS}, exported lines up to {EXPORTED}, '
        f'lines a code cell up to {LONG}, public names up to {PUBLIC}'
    )

def test_imports_run_forward():
    "A module imports from chapters before its own, and no private names"
    place = {
        m[1]: i
        for i, p in enumerate(notebooks())
        for c in cells(p, 'code')
        if (m := re.match(r'#\| default_exp (\w+)', source(c)))
    }

    def faults():
        for module, i in place.items():
            for node in ast.walk(ast.parse((ROOT/'sdip'/f'{module}.py').read_text(encoding='utf-8'))):
                if not isinstance(node, ast.ImportFrom) or node.level != 1 and not (node.module or
                                                                                    '').startswith('sdip.'):
                    continue
                other = (node.module or '').removeprefix('sdip.')
                if module != 'cli' and place.get(other, -1) > i:
                    yield f'{module} imports from {other}'
                if module != 'cli':
                    yield from (f'{module} imports {other}.{o.name}' for o in node.names
                                if o.name[0] == '_' and o.name != '__version__')

    none(sorted(set(faults())), 'imports that run back up, or take private names')

def test_public_functions_are_documented():
    "A public function, class or method says what it does, and each of its parameters what it is"
    from fastcore.docments import docments
    import importlib, inspect

    def faults():
        for p in sorted((ROOT/'sdip').glob('[!_]*.py')):
            module = importlib.import_module(f'sdip.{p.stem}')
            for name in getattr(module, '__all__', []):
                thing = getattr(module, name)
                parts = {name: thing} if inspect.isfunction(thing) else {}
                if inspect.isclass(thing) and thing.__module__ == module.__name__:
                    parts = {
                        f'{name}.{k}': v
                        for k, v in vars(thing).items()
                        if (k[0] != '_' or k == '__init__' and k in thing.__dict__)
                    }
                    if hasattr(thing, '__dataclass_fields__'):
                        parts = {k: v for k, v in parts.items() if not k.endswith('__init__')}
                if isinstance(thing, type) and thing.__module__ == module.__name__ and not thing.__doc__:
                    yield f'{p.stem}.{name}: no docstring'
                for at, f in parts.items():
                    f = f.__func__ if isinstance(f, (classmethod, staticmethod)) else f
                    f = f.fget if isinstance(f, property) else f
                    if not inspect.isfunction(f) or f.__module__ != module.__name__:
                        continue
                    if not (f.__doc__ or '').strip() and not at.endswith('__'):
                        yield f'{p.stem}.{at}: no docstring'
                    said = docments(f, returns=False)
                    yield from (
                        f'{p.stem}.{at}({k})' for k, o in inspect.signature(f).parameters.items()
                        if k not in ('self', 'cls') and not said.get(k)
                        and o.kind not in (o.VAR_KEYWORD, o.VAR_POSITIONAL))  # fastcore sees none at **kw

    none(faults(), 'public names without a docstring, parameters without a docment')

# README, site, workflows

def test_readme_agrees_with_index():
    subprocess.run([ROOT/'.ci/readme', '--check'], check=True)

def test_readme_links_exist():
    links = re.findall(r'\]\(([^)#\s]+)', (ROOT/'README.md').read_text(encoding='utf-8'))
    none((o for o in links if ':' not in o and not (ROOT/o).exists()), 'links of README.md that lead nowhere')

def test_readme_names_the_commands():
    named = set(re.findall(r'\bsdip_\w+', (ROOT/'README.md').read_text(encoding='utf-8')))
    none(
        set(commands()) - named,
        'commands that README.md does not name: add them to the table in index.ipynb')
    none(named - set(commands()), 'commands that README.md names and settings.ini does not install')

def test_quarto_yml_is_linked():
    link = ROOT/'nbs/_quarto.yml'
    assert link.is_symlink() and os.readlink(
        link) == '../_quarto.yml', 'nbs/_quarto.yml must be a link to ../_quarto.yml'

def test_quarto_yml():
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    assert site['project']['type'] == 'website' and site['metadata-files'] == ['nbdev.yml', 'sidebar.yml']
    form, web = site['format']['html'], site['website']
    assert set(form['theme']) == {'light', 'dark'} and form['respect-user-color-scheme'] is True
    assert web['navbar']['search'] is True and web['page-navigation'] is True
    links = [o['href'] for side in ('left', 'right') for o in web['navbar'][side]]
    assert links[0] == 'index.ipynb' and 'contents' not in web['sidebar'], links
    assert web['repo-subdir'] == 'nbs' and {'edit', 'issue'} <= set(web['repo-actions']), web['repo-actions']
    none((o for o in [*links, web['favicon'], form['css']] if ':' not in o and not (ROOT/'nbs'/o).exists()),
         'files that _quarto.yml names and that do not exist')

def test_sidebar_is_complete():
    subprocess.run([ROOT/'.ci/sidebar', '--check'], check=True)

def test_commands_page_is_current():
    "commands.ipynb shows each command, and what its --help prints now; where lines break is Python's"
    shown = {source(c): ''.join(o['text']) for c in cells(ROOT/'nbs/commands.ipynb', 'code')
             for o in c['outputs']}
    env = os.environ | dict(COLUMNS='80')
    for name in commands():
        said = subprocess.run([Path(sys.executable).parent/name, '--help'], check=True, capture_output=True,
                              text=True, env=env).stdout
        page = shown.get(f"show_help('{name}')", '')
        assert page.split() == said.split(), f'commands.ipynb does not show {name} --help: run and commit it'

def as_html(page):
    "A processed notebook as nbconvert renders it; Quarto's way of naming alt texts is put back"
    from nbconvert import HTMLExporter
    import nbformat
    nb = nbformat.read(page, 4)
    nb.cells = [c for c in nb.cells if c.cell_type != 'raw']
    for c in nb.cells:
        if c.cell_type == 'markdown':
            c.source = re.sub(r'!\[\]\((\S+)\)\{fig-alt="(.*)"\}', r'![\2](\1)', c.source)
        elif alt(c):
            for o in c.outputs:
                for kind in [k for k in o.get('data', {}) if k.startswith('image/')]:
                    o.setdefault('metadata', {}).setdefault(kind, {})['alt'] = alt(c)
    return HTMLExporter(template_name='basic').from_notebook_node(nb)[0]

def test_site_pages():
    """Everything nbdev does for the site before it hands over to Quarto, which is not needed here; then
    what a browser shows of these pages, where there is one"""
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    import pages
    os.chdir(ROOT)
    refresh_quarto_yml()
    nbdev = yaml.safe_load((ROOT/'nbs/nbdev.yml').read_text())
    assert nbdev['website']['repo-url'] == settings(
    )['git_url'] and nbdev['project']['output-dir'] == '_docs', nbdev
    cache = proc_nbs(n_workers=1, force=True)
    assert (cache/'_quarto.yml').read_text() == (ROOT/'_quarto.yml').read_text()
    style = (cache/'site.css').read_text()
    for p in notebooks():
        page = cells(cache/p.name)
        assert page[0]['cell_type'] == 'raw' and 'title: ' in source(
            page[0]), f'{p.name} has no title on the site'
        linked = {
            o
            for c in page if c['cell_type'] == 'markdown'
            for o in re.findall(r'!\[[^\]]*\]\((?!\w+:)([^)\s]+)', source(c))
        }
        none((o for o in linked if not (cache/o).exists()),
             f'{p.name}: pictures that do not reach the site (settings.ini: recursive = True)')
        kept = {alt(c) for c in page if c['cell_type'] == 'code'}
        none((a for c in cells(p, 'code') if (a := alt(c)) and a not in kept),
             f'{p.name}: alt texts that the site loses')
        (cache/f'{p.stem}.html').write_text(pages.framed(as_html(cache/p.name), style, p.stem))
    try:
        import playwright  # noqa: F401
    except ImportError:
        return print('not looked at in a browser: playwright is not installed')
    if pages.browser() is None:
        return print(f"not looked at in a browser: none of {', '.join(pages.BROWSERS)} is installed")
    none(pages.faults_of(sorted(cache.glob('*.html'))), 'what a browser shows of the pages')

def test_nbdev_docs_leaves_readme():
    "nbdev's own step, as nbdev_docs calls it, finds nothing to write README.md from"
    from nbdev.quarto import nbdev_readme
    os.chdir(ROOT)
    before = (ROOT/'README.md').stat().st_mtime_ns
    os.utime(ROOT/'nbs/index.ipynb')  # newer than README.md
    nbdev_readme.__wrapped__(chk_time=True)  # it would call Quarto
    assert (ROOT/'README.md').stat().st_mtime_ns == before

def test_workflows():
    flows = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT/'.github/workflows').glob('*.yml')}
    for name, flow in flows.items():
        assert flow.get('on', flow.get(True)) and flow['jobs'], name  # YAML reads `on` as True
    steps = {name: [s for job in flow['jobs'].values() for s in job['steps']] for name, flow in flows.items()}
    assert any(s.get('run') == 'bash .ci/run' for s in steps['test'])
    quarto = [s for s in steps['docs'] if s.get('uses', '').startswith('quarto-dev/quarto-actions/setup@')]
    assert re.fullmatch(r'\d+\.\d+\.\d+', quarto[0]['with']['version']), 'pin the version of Quarto'
    said = [s.get('run', '') for s in steps['docs']]
    at = [next(i for i, o in enumerate(said) if part in o) for part in ('nbdev_docs', '.ci/pages.py _docs')]
    assert at == sorted(at), 'the pages are looked at after they were rendered'

# package

def commands():
    "Names of the shell commands that settings.ini installs"
    return [o.partition('=')[0] for o in settings()['console_scripts'].split()]

def test_editable_install_is_this_clone():
    import sdip
    assert Path(sdip.__file__).resolve(
    ) == ROOT/'sdip/__init__.py', (f'{sdip.__file__} is another clone: '
                                        'run .ci/run alone, or with another SDIP_CI_CACHE')

def test_console_scripts():
    tree = ast.parse((ROOT/'sdip/cli.py').read_text(encoding='utf-8'))
    defined = {o.name for o in tree.body if isinstance(o, ast.FunctionDef) and not o.name.startswith('_')}
    scripts = settings()['console_scripts'].split()
    assert set(
        commands()
    ) == defined, (f'only in settings.ini: {set(commands()) - defined}; '
                  f'only in sdip/cli.py: {defined - set(commands())}')
    none((o for o in scripts if not re.fullmatch(r'(\w+)=sdip\.cli:\1', o)),
         'entries of console_scripts read name=sdip.cli:name')

def test_help_is_quick():
    cpu = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

    def seconds(name):
        start = cpu()
        out = subprocess.run([Path(sys.executable).parent/name, '--help'], check=True, capture_output=True,
                             text=True).stdout
        assert 'usage' in out, f'{name} --help says: {out}'
        return cpu() - start

    none((f'{name}: {s:.1f} s' for name in commands() if (s := seconds(name)) >= 2),
         '--help takes 2 CPU s or more: import inside the function')

def test_modules_have_notebooks():
    made_from = {
        p: re.search(r'File to edit: (\S+)\.$', p.read_text(encoding='utf-8'), re.M)
        for p in (ROOT/'sdip').rglob('*.py')
    }
    none((p.name for p, m in made_from.items() if m and not (p.parent/m[1]).exists()),
         'modules whose notebook is gone: delete them')

def test_kernels():
    "Each chapter that can be pushed is there, and its metadata says what Kaggle's client would else choose itself"
    from sdip.push import KERNELS, kernel_metadata
    lost = [n for n in KERNELS if not (ROOT/f'nbs/{n}.ipynb').is_file()]
    assert not lost, f'07_push lists chapters that are not there: {lost}'
    for name in KERNELS:
        meta = kernel_metadata(name, 'ada')
        assert (meta['is_private'], meta['enable_internet'], meta['enable_tpu']) == (True, False, False), meta
        assert meta['id'] == 'ada/sdip-' + name.replace('_', '-'), meta['id']
        assert meta['enable_gpu'] == (meta.get('machine_shape') == 'NvidiaTeslaT4'), meta
        for c in cells(ROOT/f'nbs/{name}.ipynb', 'code'):
            if c['id'] == 'parameters':  # nbdev_clean drops a tag that settings.ini does not allow
                assert 'parameters' in c['metadata'].get('tags', ()), f'{name}: --set needs the tag of its parameters'

def test_chapters_find_sdip():
    "The first code cell of the chapters, which finds sdip wherever they run, is one and the same"
    homes = {
        p.name: source(cells(p, 'code')[0])
        for p in notebooks()
        if re.match(r'0[1-7]|00[a-z]?_(?!cli)|tour', p.name)
    }
    [home] = set(homes.values())
    assert len(home.splitlines()) <= 8 and home.endswith('setup_notebook()'), homes
    code = home + "\nfrom importlib.util import find_spec; print(find_spec('sdip').origin)"
    alone = subprocess.run([sys.executable, '-I', '-S', '-c', code], cwd=ROOT/'nbs', check=True,
                           capture_output=True, text=True).stdout  # nothing is installed
    assert alone.strip() == str(
        ROOT/'sdip/__init__.py'), f'in a clone that is not installed the chapters find {alone}'

# last, after everything that could leave a trace

def test_export_and_clean_leave_no_diff():
    before = json.loads(Path(
        os.environ['SDIP_CI_BEFORE']).read_text()) if 'SDIP_CI_BEFORE' in os.environ else snapshot()
    for command in 'nbdev_export', 'nbdev_clean':
        subprocess.run(command, cwd=ROOT, check=True)
    after = snapshot()
    none(
        sorted(p for p in {*before, *after} if before.get(p) != after.get(p)),
        'files that a test, nbdev_export or nbdev_clean made, changed or deleted: '
        'run nbdev_export && nbdev_clean and commit'
    )
