<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{{ title|e }}</title>
<style>
body{font-family:sans-serif;margin:0 auto;max-width:1500px;padding:0 1.5em 3em;color:#222;line-height:1.45}
nav{position:sticky;top:0;background:#fff;border-bottom:1px solid #ccc;padding:.6em 0;z-index:1;overflow-x:auto;white-space:nowrap}
nav a{margin-right:1.2em;color:#05a;text-decoration:none}
section{scroll-margin-top:3em}
h1,h2,th,td,li{overflow-wrap:anywhere}
h1{font-size:1.5em;margin-top:1.4em}
h2{font-size:1.15em;margin-top:1.6em}
h3{font-size:1em}
object{display:block;width:100%;border:0}
table{border-collapse:collapse}
th,td{text-align:left;padding:.2em 1em .2em 0;border-bottom:1px solid #eee;vertical-align:top}
th{font-weight:normal;color:#666}
.wide{overflow-x:auto}.wide th{min-width:8em}
.notice{background:#eef3fb;border-left:4px solid #47a;padding:.6em}
pre{background:#f6f6f6;padding:1em;overflow:auto;font-size:.85em}
small,.caption{color:#666}
.warnings,.failed{background:#fff3cd;border-left:4px solid #e0a800;padding:.6em .6em .6em 2em;margin:1em 0}
.failed{background:#f8d7da;border-color:#c33}
@media(max-width:600px){body{padding:0 .7em 2em}.wide td{white-space:nowrap}}
.fine{background:#e6f4ea;border-left:4px solid #2a8a4a;padding:.6em}
</style>
</head>
<body>
<nav>{% for section in sections %}<a href="#{{ section.name|e }}">{{ section.title }}</a>{% endfor %}</nav>
<h1>{{ title|e }}</h1>
{% for section in sections %}
<section id="{{ section.name|e }}">
<h1>{{ section.title }}</h1>
{% for reportlet in section.reportlets %}
{% if reportlet.subtitle %}<h2>{{ reportlet.subtitle }}</h2>{% endif %}
{% if reportlet.description %}<p class="caption">{{ reportlet.description }}</p>{% endif %}
{% for contents, caption in reportlet.components %}
{{ contents }}
{% if caption %}<p class="caption">{{ caption }}</p>{% endif %}
{% endfor %}
{% endfor %}
</section>
{% endfor %}
</body>
</html>
