{{/* How the router learns of the engines: the one place that knows those options of `tknp router`. */}}
{{- define "tknp.discoveryArgs" -}}
{{- if eq .Values.discovery.mode "kubernetes" }}
- --discovery=kubernetes
- --kubernetes-namespace={{ .Release.Namespace }}
- --kubernetes-selector-prefill={{ include "tknp.selector" (dict "root" . "component" "prefill") }}
- --kubernetes-selector-decode={{ include "tknp.selector" (dict "root" . "component" "decode") }}
{{- else }}
- --prefill-urls={{ include "tknp.staticUrls" (dict "root" . "component" "prefill") }}
- --decode-urls={{ include "tknp.staticUrls" (dict "root" . "component" "decode") }}
{{- end }}
{{- end }}

{{/* Each engine by the name that its StatefulSet or LeaderWorkerSet gives it in the headless service. */}}
{{- define "tknp.staticUrls" -}}
{{- $spec := mergeOverwrite (deepCopy .root.Values.engines) (index .root.Values .component) }}
{{- $name := printf "%s-%s" (include "tknp.fullname" .root) .component }}
{{- $urls := list }}
{{- range $index := until (int $spec.replicas) }}
{{- $urls = append $urls (printf "http://%s-%d.%s.%s.svc:%d" $name $index $name $.root.Release.Namespace (int $spec.port)) }}
{{- end }}
{{- join "," $urls }}
{{- end }}
