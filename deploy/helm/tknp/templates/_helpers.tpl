{{- define "tknp.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* What identifies a pod; nothing that changes with the chart's version, which would restart engines for nothing. */}}
{{- define "tknp.podMetadata" -}}
labels:
  {{- include "tknp.selectorLabels" . | nindent 2 }}
  {{- with mergeOverwrite (dict) .root.Values.commonLabels .spec.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .spec.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* At most 40 characters: Kubernetes adds to the names of pods, and a label holds 63. */}}
{{- define "tknp.fullname" -}}
{{- $name := include "tknp.name" . }}
{{- $whole := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) }}
{{- default $whole .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "tknp.selectorLabels" -}}
app.kubernetes.io/name: {{ include "tknp.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* The same labels as one selector, for the router's command line. */}}
{{- define "tknp.selector" -}}
app.kubernetes.io/name={{ include "tknp.name" .root }},app.kubernetes.io/instance={{ .root.Release.Name }},app.kubernetes.io/component={{ .component }}
{{- end }}

{{/* labels and annotations of an object. Takes root, component, labels and annotations; the last two may be missing. */}}
{{- define "tknp.metadata" -}}
labels:
  {{- include "tknp.selectorLabels" . | nindent 2 }}
  app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ .root.Release.Service }}
  helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
  {{- with mergeOverwrite (dict) .root.Values.commonLabels (default dict .labels) }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with mergeOverwrite (dict) .root.Values.commonAnnotations (default dict .annotations) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Takes root, image: what differs from the common one, and device if not that of both pools. */}}
{{- define "tknp.image" -}}
{{- $image := mergeOverwrite (deepCopy .root.Values.image) (default dict .image) }}
{{- $tag := default (printf "%s-%s" .root.Chart.AppVersion (default .root.Values.engines.device .device)) $image.tag }}
{{- $image.repository }}{{ empty $image.digest | ternary (printf ":%s" $tag) (printf "@%s" $image.digest) }}
{{- end }}

{{- define "tknp.pullPolicy" -}}
{{- (mergeOverwrite (deepCopy .root.Values.image) (default dict .image)).pullPolicy }}
{{- end }}

{{/* options of an engine as words: vLLM's argparse takes a list as several words, a map as JSON. */}}
{{- define "tknp.engineOptions" -}}
{{- range $name, $value := . }}
{{- if kindIs "bool" $value }}
- {{ printf "--%s%s" (ternary "" "no-" $value) $name }}
{{- else if kindIs "slice" $value }}
- --{{ $name }}
{{- range $value }}
- {{ kindIs "string" . | ternary . (toJson .) | toJson }}
{{- end }}
{{- else if not (kindIs "invalid" $value) }}
- {{ printf "--%s=%s" $name (kindIs "string" $value | ternary $value (toJson $value)) | toJson }}
{{- end }}
{{- end }}
{{- end }}

{{/* options of the router as words: a list is one word with commas, a map name=value with commas. */}}
{{- define "tknp.routerOptions" -}}
{{- range $name, $value := . }}
{{- if kindIs "bool" $value }}
- {{ printf "--%s%s" (ternary "" "no-" $value) $name }}
{{- else if kindIs "slice" $value }}
- {{ printf "--%s=%s" $name (join "," $value) | toJson }}
{{- else if kindIs "map" $value }}
{{- $pairs := list }}
{{- range $alias, $model := $value }}{{ $pairs = append $pairs (printf "%s=%s" $alias $model) }}{{ end }}
- {{ printf "--%s=%s" $name (join "," $pairs) | toJson }}
{{- else if not (kindIs "invalid" $value) }}
- {{ printf "--%s=%s" $name (kindIs "string" $value | ternary $value (toJson $value)) | toJson }}
{{- end }}
{{- end }}
{{- end }}

{{/* A map of environment variables as a list; null leaves one out. */}}
{{- define "tknp.env" -}}
{{- range $name, $value := . }}
{{- if kindIs "map" $value }}
- name: {{ $name }}
  {{- toYaml $value | nindent 2 }}
{{- else if not (kindIs "invalid" $value) }}
- name: {{ $name }}
  value: {{ kindIs "string" $value | ternary $value (toJson $value) | toJson }}
{{- end }}
{{- end }}
{{- end }}

{{/* Where pods run, and what the values add, in the words of a pod's spec. Takes root, component, spec (the values) and affinity. */}}
{{- define "tknp.placement" -}}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- range $key := list "nodeSelector" "tolerations" "priorityClassName" "runtimeClassName" "schedulerName" }}
{{- with index $.spec $key }}
{{ $key }}: {{ toJson . }}
{{- end }}
{{- end }}
{{- with .spec.affinity | default .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.topologySpreadConstraints }}
topologySpreadConstraints: {{- tpl (toYaml .) $.root | nindent 2 }}
{{- end }}
{{- if .spec.hostNetwork }}
hostNetwork: true
{{- if not (hasKey .spec.extraPodSpec "dnsPolicy") }}
dnsPolicy: ClusterFirstWithHostNet
{{- end }}
{{- end }}
{{- with .spec.extraPodSpec }}
{{ tpl (toYaml .) $.root }}
{{- end }}
{{- end }}

{{- define "tknp.serviceAccountName" -}}
{{- $account := .spec.serviceAccount }}
{{- $account.name | default (ternary (printf "%s-%s" (include "tknp.fullname" .root) .component) "default" $account.create) }}
{{- end }}

{{/* Takes root, enabled (true, false or "auto") and api; "true" or nothing. */}}
{{- define "tknp.wanted" -}}
{{- if kindIs "bool" .enabled }}{{ .enabled | ternary "true" "" }}
{{- else }}{{ .root.Capabilities.APIVersions.Has .api | ternary "true" "" }}
{{- end }}
{{- end }}

{{- define "tknp.huggingFaceSecret" -}}
{{- .Values.huggingFace.existingSecret | default (empty .Values.huggingFace.token | ternary "" (printf "%s-hugging-face" (include "tknp.fullname" .))) }}
{{- end }}

{{/* Labels of the series that this release's routers export. */}}
{{- define "tknp.fromRouters" -}}
namespace="{{ .Release.Namespace }}",pod=~"{{ include "tknp.fullname" . }}-router-.+"
{{- end }}

{{- define "tknp.routerScheme" -}}
{{- empty .Values.router.tls.existingSecret | ternary "http" "https" }}
{{- end }}

{{/* What values.schema.json can't say. */}}
{{- define "tknp.check" -}}
{{- $values := .Values }}
{{- if not $values.model }}
{{- fail "model is not set: name a model of the Hugging Face hub, such as --set model=Qwen/Qwen3-8B, or a folder in the engines' pods" }}
{{- end }}
{{- if or (hasKey $values.prefill "tokenParallelSize") (hasKey $values.engines "tokenParallelSize") }}
{{- fail "tokenParallelSize is of decode engines alone: set decode.tokenParallelSize" }}
{{- end }}
{{- range $pool := list "engines" "prefill" "decode" }}
{{- $spec := index $values $pool }}
{{- range $name, $value := dict "host" "listen" "port" "port" "side-channel-port" "sideChannelPort" "shutdown-timeout" "shutdownSeconds" "token-parallel-size" "tokenParallelSize" "model" "model, for both pools" "api-key" "engineApiKey, for both pools" }}
{{- if hasKey (default dict $spec.options) $name }}
{{- fail (printf "%s.options.%s is the chart's to set; use the value %s" $pool $name $value) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and $values.huggingFace.token $values.huggingFace.existingSecret }}
{{- fail "huggingFace.token and huggingFace.existingSecret are both set; give one" }}
{{- end }}
{{- if and $values.router.tls.clientCASecret (not $values.router.tls.existingSecret) }}
{{- fail "router.tls.clientCASecret needs router.tls.existingSecret: clients show certificates only to a server that has one" }}
{{- end }}
{{- if and $values.router.apiKeys.existingSecret (include "tknp.wanted" (dict "root" . "enabled" $values.metrics.podMonitor.enabled "api" "monitoring.coreos.com/v1")) (not $values.metrics.podMonitor.routerAuthorization) (not $values.router.apiKeys.openMetrics) }}
{{- fail "with router.apiKeys, /metrics asks for a key too: name one in metrics.podMonitor.routerAuthorization, or set router.apiKeys.openMetrics=true" }}
{{- end }}
{{- end }}
