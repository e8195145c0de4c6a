{{/* GPUs of each pod. Takes component and spec. */}}
{{- define "tknp.gpusPerPod" -}}
{{- $options := .spec.options }}
{{- $tensor := index $options "tensor-parallel-size" | default 1 | int }}
{{- $pipeline := index $options "pipeline-parallel-size" | default 1 | int }}
{{- $workers := mul $tensor $pipeline (.spec.tokenParallelSize | default 1 | int) }}
{{- if eq .spec.device "cpu" }}0
{{- else if not (kindIs "invalid" .spec.gpu.count) }}{{ int .spec.gpu.count }}
{{- else if mod $workers (int .spec.nodes) }}
{{- fail (printf "a %s engine has %d workers, which can't be spread evenly over %d nodes; change %s.nodes, or set %s.gpu.count" .component $workers (int .spec.nodes) .component .component) }}
{{- else }}{{ div $workers (int .spec.nodes) }}
{{- end }}
{{- end }}

{{/* What joins the nodes of an engine: native, ray, or nothing where there is one node. */}}
{{- define "tknp.backend" -}}
{{- $size := .spec.tokenParallelSize | default 1 | int }}
{{- if gt (int .spec.nodes) 1 }}
{{- if and (eq .spec.multiNode.backend "native") (or (ne .component "decode") (mod $size (int .spec.nodes))) }}
{{- fail (printf "%s.nodes is %d, over which multiNode.backend=native spreads the token-parallel ranks of a decode engine, of which there are %d: make their number a multiple, or set %s.multiNode.backend=ray" .component (int .spec.nodes) $size .component) }}
{{- end }}
{{- .spec.multiNode.backend }}
{{- end }}
{{- end }}

{{/* The words after `tknp`. Takes root, component and spec. */}}
{{- define "tknp.engineArgs" -}}
{{- $spec := .spec }}
- {{ .component }}
- {{ .root.Values.model | toJson }}
- --host={{ $spec.listen }}
- --port={{ int $spec.port }}
- --side-channel-port={{ int $spec.sideChannelPort }}
{{- if eq .component "decode" }}
- --token-parallel-size={{ int $spec.tokenParallelSize }}
{{- end }}
- --shutdown-timeout={{ int $spec.shutdownSeconds }}
{{- if eq (include "tknp.backend" .) "native" }}
- --nnodes={{ int $spec.nodes }}
- --node-rank=$(LWS_WORKER_INDEX)
- --master-addr=$(LWS_LEADER_ADDRESS)
- --master-port={{ int $spec.multiNode.masterPort }}
{{- else if eq (include "tknp.backend" .) "ray" }}
- --distributed-executor-backend=ray
{{- end }}
{{- include "tknp.engineOptions" $spec.options }}
{{- with $spec.extraArgs }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What every container of an engine gets from the environment; the values' own entries win. */}}
{{- define "tknp.engineEnv" -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- $env := dict "HOME" "/home/tknp" "HF_HOME" (printf "%s/huggingface" .root.Values.modelCache.mountPath) }}
{{- $_ := set $env "VLLM_HOST_IP" "$(POD_IP)" }}
{{- $_ := set $env "VLLM_NIXL_SIDE_CHANNEL_HOST" "$(POD_IP)" }}
{{- $_ := set $env "VLLM_NO_USAGE_STATS" "1" }}
{{- if eq (include "tknp.backend" .) "ray" }}
{{- $_ := set $env "RAY_USAGE_STATS_ENABLED" "0" }}
{{- end }}
{{- with include "tknp.huggingFaceSecret" .root }}
{{- $_ := set $env "HF_TOKEN" (dict "valueFrom" (dict "secretKeyRef" (dict "name" . "key" $.root.Values.huggingFace.key))) }}
{{- end }}
{{- with .root.Values.engineApiKey.existingSecret }}
{{- $_ := set $env "VLLM_API_KEY" (dict "valueFrom" (dict "secretKeyRef" (dict "name" . "key" $.root.Values.engineApiKey.key))) }}
{{- end }}
{{- include "tknp.env" (mergeOverwrite $env .spec.env) }}
{{- end }}

{{- define "tknp.engineResources" -}}
{{- $extra := dict }}
{{- $gpus := include "tknp.gpusPerPod" . | int }}
{{- if $gpus }}{{ $_ := set $extra .spec.gpu.resource $gpus }}{{ end }}
{{- if .spec.rdma.enabled }}{{ $_ := set $extra .spec.rdma.resource (int .spec.rdma.count) }}{{ end }}
{{- $limits := mergeOverwrite (deepCopy $extra) .spec.resources.limits }}
{{- $requests := mergeOverwrite (deepCopy $extra) .spec.resources.requests }}
{{- $resources := dict "limits" $limits "requests" $requests }}
{{- with .spec.resources.claims }}{{ $_ := set $resources "claims" . }}{{ end }}
{{- toYaml $resources }}
{{- end }}

{{- define "tknp.engineSecurityContext" -}}
{{- $context := deepCopy .spec.securityContext }}
{{- if .spec.rdma.enabled }}
{{- $capabilities := $context.capabilities | default dict }}
{{- $_ := set $context "capabilities" (mergeOverwrite $capabilities (dict "add" (append ($capabilities.add | default list) "IPC_LOCK" | uniq))) }}
{{- end }}
{{- toYaml $context }}
{{- end }}

{{/* Near the other pool's engines, if asked to. */}}
{{- define "tknp.engineAffinity" -}}
{{- with .spec.colocate }}
{{- if .topologyKey }}
{{- $selector := dict "matchLabels" (dict "app.kubernetes.io/name" (include "tknp.name" $.root) "app.kubernetes.io/instance" $.root.Release.Name) "matchExpressions" (list (dict "key" "app.kubernetes.io/component" "operator" "In" "values" (list "prefill" "decode"))) }}
{{- $term := dict "topologyKey" .topologyKey "labelSelector" $selector }}
podAffinity:
{{- if .required }}
  requiredDuringSchedulingIgnoredDuringExecution: {{ toJson (list $term) }}
{{- else }}
  preferredDuringSchedulingIgnoredDuringExecution: {{ toJson (list (dict "weight" 100 "podAffinityTerm" $term)) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* A pod of an engine: metadata and spec. Takes root, component, spec and role: engine, leader or worker. A worker only
lends its GPUs to the leader's engine; it serves nobody and must not be discovered. */}}
{{- define "tknp.enginePod" -}}
{{- $spec := .spec }}
{{- $isWorker := eq .role "worker" }}
{{- $name := $isWorker | ternary (printf "%s-worker" .component) .component }}
{{- $backend := include "tknp.backend" . }}
{{- $rayPort := int $spec.multiNode.rayPort }}
metadata:
  {{- include "tknp.podMetadata" (dict "root" .root "component" $name "spec" $spec) | nindent 2 }}
spec:
  serviceAccountName: {{ include "tknp.serviceAccountName" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add $spec.preStopSeconds $spec.shutdownSeconds 30 }}
  securityContext: {{- toYaml $spec.podSecurityContext | nindent 4 }}
  {{- include "tknp.placement" (dict "root" .root "spec" $spec "affinity" (include "tknp.engineAffinity" . | fromYaml)) | trim | nindent 2 }}
  {{- with $spec.initContainers }}
  initContainers: {{- tpl (toYaml .) $.root | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ $name }}
      image: {{ include "tknp.image" (dict "root" .root "image" $spec.image "device" $spec.device) }}
      imagePullPolicy: {{ include "tknp.pullPolicy" (dict "root" .root "image" $spec.image "device" $spec.device) }}
      securityContext: {{- include "tknp.engineSecurityContext" . | nindent 8 }}
      {{- if ne $backend "ray" }}
      command: [tknp]
      args: {{- include "tknp.engineArgs" . | trim | nindent 8 }}
      {{- else if not $isWorker }}
      command:
        - sh
        - -c
        - >-
          ray start --head --node-ip-address="$POD_IP" --port={{ $rayPort }} &&
          export RAY_ADDRESS="$POD_IP:{{ $rayPort }}" &&
          exec tknp "$@"
        - tknp
      args: {{- include "tknp.engineArgs" . | trim | nindent 8 }}
      {{- else }}
      command:
        - sh
        - -c
        - >-
          until ray health-check --address "$LWS_LEADER_ADDRESS:{{ $rayPort }}"; do sleep 2; done;
          exec ray start --address "$LWS_LEADER_ADDRESS:{{ $rayPort }}" --node-ip-address="$POD_IP" --block
      {{- end }}
      env: {{- include "tknp.engineEnv" . | trim | nindent 8 }}
      {{- with $spec.envFrom }}
      envFrom: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- if not $isWorker }}
      ports:
        - {name: http, containerPort: {{ int $spec.port }}}
        - {name: side-channel, containerPort: {{ int $spec.sideChannelPort }}}
      startupProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: {{ div (add $spec.probes.startupSeconds 4) 5 }}
      readinessProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: {{ int $spec.probes.readinessPeriodSeconds }}
        timeoutSeconds: 5
        failureThreshold: 3
      livenessProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: {{ int $spec.probes.livenessPeriodSeconds }}
        timeoutSeconds: {{ int $spec.probes.livenessTimeoutSeconds }}
        failureThreshold: {{ int $spec.probes.livenessFailures }}
      lifecycle:
        preStop: {exec: {command: [sleep, "{{ int $spec.preStopSeconds }}"]}}
      {{- end }}
      resources: {{- include "tknp.engineResources" . | nindent 8 }}
      volumeMounts:
        - {name: models, mountPath: {{ .root.Values.modelCache.mountPath | toJson }}, readOnly: {{ .root.Values.modelCache.readOnly }}}
        - {name: shared-memory, mountPath: /dev/shm}
        - {name: temporary, mountPath: /tmp}
        - {name: home, mountPath: /home/tknp}
        {{- with $spec.extraVolumeMounts }}
        {{- tpl (toYaml .) $.root | nindent 8 }}
        {{- end }}
    {{- with $spec.extraContainers }}
    {{- tpl (toYaml .) $.root | nindent 4 }}
    {{- end }}
  volumes:
    - name: models
      {{- include "tknp.modelVolume" .root | nindent 6 }}
    - name: shared-memory
      emptyDir: {medium: Memory, sizeLimit: {{ $spec.sharedMemory }}}
    {{- range list "temporary" "home" }}
    - name: {{ . }}
      emptyDir: {{ empty $spec.temporaryStorage | ternary dict (dict "sizeLimit" $spec.temporaryStorage) | toJson }}
    {{- end }}
    {{- with $spec.extraVolumes }}
    {{- tpl (toYaml .) $.root | nindent 4 }}
    {{- end }}
{{- end }}

{{- define "tknp.modelVolume" -}}
{{- $cache := .Values.modelCache }}
{{- if eq $cache.type "persistentVolumeClaim" -}}
persistentVolumeClaim: {claimName: {{ $cache.existingClaim | default (printf "%s-models" (include "tknp.fullname" .)) }}}
{{- else if eq $cache.type "hostPath" -}}
hostPath: {path: {{ $cache.hostPath | toJson }}, type: {{ $cache.readOnly | ternary "Directory" "DirectoryOrCreate" }}}
{{- else -}}
emptyDir: {{ empty $cache.sizeLimit | ternary dict (dict "sizeLimit" $cache.sizeLimit) | toJson }}
{{- end }}
{{- end }}
